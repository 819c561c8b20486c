"""Formulas for the gradients of parameters, by kind of layer, and a registry of them."""

from __future__ import annotations
