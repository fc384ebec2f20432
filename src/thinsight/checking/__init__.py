"""Holds a model under a reduction to what the stock model says: the conformance suite's ways, for any loaded model."""
