"""The next parameters to try, by Bayesian optimisation: Optuna's Gaussian-process sampler through ask/tell.

A pure function of what was seen and the seed, so that a resumed search proposes the same. Knows nothing about
what the parameters are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["propose", "quiet"]

_STARTUP = 4  # random proposals before the Gaussian process takes over
_SEEDS = 10_007  # more than the trials of any search


def propose(
    seen: Sequence[tuple[Mapping[str, float], float]],
    space: Mapping[str, tuple[float, float, bool]],
    seed: int,
    number: int,
) -> dict[str, float]:
    """Parameters to try, each a float.

    Args:
        seen: parameters and the value each gave; higher is better, and values are taken as noisy.
        space: per parameter its lowest and highest value, and whether its scale is logarithmic.
        seed: of the search.
        number: of the proposal within it.
    """
    import optuna

    with quiet(optuna):
        sampler = optuna.samplers.GPSampler(seed=(seed * _SEEDS + number) % 2**32, n_startup_trials=_STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {
            name: optuna.distributions.FloatDistribution(low, high, log=log)
            for name, (low, high, log) in space.items()
        }
        for parameters, value in seen:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(parameters), distributions=dict(distributions), value=value
                )
            )
        asked = study.ask(dict(distributions)).params
        return {name: float(asked[name]) for name in space}


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from writing a line per study to the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
