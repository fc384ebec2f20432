"""Turns an original InternVL checkpoint into a folder for stock transformers, running none of its code.

The package's one entry is `convert`. Knows nothing about reductions, searches or evaluation.
"""

from __future__ import annotations

from .checkpoint import convert

__all__ = ["convert"]
