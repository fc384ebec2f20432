"""Holds a model under a reduction to what the stock model says: for the conformance suite, and for any loaded model.

`prompts.py` makes inputs, `reference.py` is the yardstick, `comparing.py` sets both side by side; `subject.py` makes a
loaded model one that can be checked, and `run.py` checks it. Knows nothing about any one family.
"""

from __future__ import annotations

from .run import check as check
