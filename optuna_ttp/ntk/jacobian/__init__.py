"""Rows of the Jacobian: which module answers for which weights, and what is held of them.

The tape records the calls of layers; claims say whose rule makes which parameter's gradient,
checked against plain automatic differentiation; a layout says how each parameter's part is held.
"""

from __future__ import annotations
