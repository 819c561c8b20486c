"""Computation and storage of the rows of the Jacobian.

The tape records the calls of layers; claims name the module that computes each parameter's
gradient, checked against plain automatic differentiation; a layout says how it is stored.
"""

from __future__ import annotations
