"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..counters import HELP, KEPT, REDUCED, SEEN, WHOLE

OUTCOMES = ("answered", "refused", "cancelled", "failed", "busy")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server.

    Args:
        models: the names that clients may ask for.
    """

    def __init__(self, models: tuple[str, ...]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("thinsight:requests", "Requests, by how they ended.", ["model", "outcome"], **own)
        self._seen = Counter(SEEN, HELP[SEEN], **own)
        self._kept = Counter(KEPT, HELP[KEPT], ["layers"], **own)
        self._reduced = Counter(REDUCED, HELP[REDUCED], **own)
        self._whole = Counter(WHOLE, HELP[WHOLE], ["reason"], **own)
        self.prompt_tokens = Counter("thinsight:prompt_tokens", "Tokens of prompts, all of them.", ["model"], **own)
        self.answer_tokens = Counter("thinsight:answer_tokens", "Tokens of answers.", ["model"], **own)
        self.waited = Histogram("thinsight:wait_seconds", "From a request to its turn.", buckets=_SECONDS, **own)
        self.first = Histogram(
            "thinsight:first_token_seconds",
            "From its turn to an answer's first token.",
            ["model"],
            buckets=_SECONDS,
            **own,
        )
        self.seconds = Histogram(
            "thinsight:answer_seconds", "From its turn to an answer's end.", ["model"], buckets=_SECONDS, **own
        )
        self.open = Gauge("thinsight:requests_open", "Requests that are answered or wait for their turn.", **own)
        for model in models:  # so that each is there, and 0, before it is first counted
            for outcome in OUTCOMES:
                self.requests.labels(model, outcome)

    def prompt(self, seen: int, kept: Mapping[str, int], reduced: bool) -> None:
        """A prompt with so many vision tokens was read; ``kept`` of them entered the layers of each stage."""
        if not seen:
            return
        self._seen.inc(seen)
        for layers, count in kept.items():
            self._kept.labels(layers).inc(count)
        if reduced:
            self._reduced.inc()
        else:
            self._whole.labels("the full model was asked").inc()

    def page(self) -> tuple[bytes, str]:
        """As text of Prometheus, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
