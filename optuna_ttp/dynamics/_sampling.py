"""How mini-batches are drawn: a new permutation every epoch, or every sample anew."""

from __future__ import annotations

from typing import Literal


Sampling = Literal["shuffle", "replacement"]
