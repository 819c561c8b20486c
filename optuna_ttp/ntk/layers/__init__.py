"""How layers make the gradients of their parameters: a file for each kind of layer, a registry."""

from __future__ import annotations
