"""Turns an original InternVL checkpoint into a folder for stock transformers, running none of its code."""

from __future__ import annotations

from .checkpoint import convert

__all__ = ["convert"]
