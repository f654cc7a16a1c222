"""Intervals over training runs: what another seed and other speakers would have given.

A figure of a training recipe varies in two ways: with the run (initialisation, data order,
augmentation) and with the clips that happened to be tested. All runs are tested on the same clips,
so the two are estimated apart and their variances added: between runs that of the runs' figures,
between clips that of the figure averaged over runs (linearised, by speaker where there are at least
ten, otherwise by utterance). The degrees of freedom are Satterthwaite's (1946).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from melprobe.analysis.statistics import Interval, clusters, ratio_error


def over_seeds(
    errors: ArrayLike, words: ArrayLike, speakers: Sequence[str], confidence: float = 0.95
) -> Interval:
    """Word error rate of a recipe: errors [runs, N] over words [N].

    Unbounded with one run, whose luck nobody knows.
    """
    return _interval([np.asarray(errors, np.float64)], words, speakers, confidence)


def difference_over_seeds(
    a: ArrayLike,
    b: ArrayLike,
    words: ArrayLike,
    speakers: Sequence[str],
    confidence: float = 0.95,
) -> Interval:
    """Word error rate of recipe `a` less that of `b`, errors [runs, N] each, on the same clips."""
    return _interval(
        [np.asarray(a, np.float64), np.asarray(b, np.float64)], words, speakers, confidence
    )


def _interval(
    arms: list[np.ndarray], words: ArrayLike, speakers: Sequence[str], confidence: float
) -> Interval:
    below = np.asarray(words, np.float64)
    signs = (1.0, -1.0)[: len(arms)]
    value = sum(s * arm.sum() / len(arm) for s, arm in zip(signs, arms, strict=True)) / below.sum()
    if min(len(arm) for arm in arms) < 2:
        return Interval(float(value), -np.inf, np.inf)
    parts = []  # (variance, degrees of freedom)
    for arm in arms:
        rates = arm.sum(axis=1) / below.sum()
        parts.append((rates.var(ddof=1) / len(arm), len(arm) - 1))
    unit_of, n_units = clusters(speakers)
    mean = sum(s * arm.mean(axis=0) for s, arm in zip(signs, arms, strict=True))
    parts.append((ratio_error(mean, below, unit_of, n_units) ** 2, n_units - 1))
    variance = sum(part for part, _ in parts)
    if n_units < 2:
        return Interval(float(value), -np.inf, np.inf)
    if variance == 0:
        return Interval(float(value), float(value), float(value))
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    reach = student.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    return Interval(float(value), float(value - reach), float(value + reach))
