"""How layers make the gradients of their parameters: the tape, a rule a kind, the check."""

from __future__ import annotations
