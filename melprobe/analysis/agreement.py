"""Do the two arms of a pair agree in a layer more than chance runs of one arm do?

D_l = mean similarity of two runs of one arm − mean similarity of two runs of different arms, at
layer l. Where arms agree it is 0: another arm is no further away than another seed. That it is
below a margin is a claim of non-inferiority, that it is above one of specificity (`claims.py` says
how claims are made).

Its variance has two parts that are added: from the runs that happened to be trained, by leaving out
one at a time in either arm (two-sample jackknife: a run stands in many pairs, so pairs can't be
resampled), and from the clips that happened to be heard, by leaving out a block of them at a time.
Where pairs differ each by itself the first errs on the safe side, and where runs do it is exact: of
simulated studies of ten layers with the truth at the margin, 0.3 to 5.1 % claim anything
(`tests/test_agreement.py`), where 5 % were allowed.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from melprobe.analysis.claims import ALPHA, holm
from melprobe.analysis.statistics import Floats
from melprobe.errors import UsageError

FEWEST_RUNS = 3
Agreement = Literal["agnostic", "specific", "undecided", "undecided: seeds"]


class LayerAgreement(NamedTuple):
    """What is said of a layer."""

    claim: Agreement
    within: float
    """mean similarity of runs of one arm, both arms alike: the ceiling"""
    between: float
    difference: float
    """D, within less between"""
    error: float | None
    """its standard error; None with too few runs"""
    p_agnostic: float | None
    """of "D is the margin or more", over all layers (Holm)"""
    p_specific: float | None
    """of "D is the margin or less", over all layers (Holm)"""
    smallest_margin: float | None
    """at which the layer by itself would pass as one of as many"""


def agreement(
    similarity: ArrayLike, arms: Sequence[str], margin: float, by_block: ArrayLike | None = None
) -> list[LayerAgreement]:
    """Of each layer.

    similarity: [L, M, M], symmetric, of M runs at L layers. arms: [M] which of two each run is of.
    by_block: [K, L, M, M], the same without each of K blocks of clips; without it the intervals
    speak of these clips only. UsageError unless there are two arms.
    """
    whole = np.asarray(similarity, np.float64)
    names = list(dict.fromkeys(arms))
    if len(names) != 2:
        raise UsageError(f"agreement is between two arms, and there are {', '.join(names)}")
    first = np.array([arm == names[0] for arm in arms])
    within, between = _means(whole, first)
    difference = within - between
    if min(first.sum(), (~first).sum()) < FEWEST_RUNS:
        return [
            LayerAgreement("undecided: seeds", w, b, d, None, None, None, None)
            for w, b, d in zip(within.tolist(), between.tolist(), difference.tolist(), strict=True)
        ]
    error, freedom = _error(whole, first, by_block)
    p_below, p_above = _p(difference - margin, error, freedom)
    agnostic, specific = holm(p_below), holm(p_above)
    smallest = difference + student.ppf(1 - ALPHA / len(difference), freedom) * error
    found = []
    for layer in range(len(difference)):
        claim: Agreement = "undecided"
        if agnostic[layer] <= ALPHA:
            claim = "agnostic"
        elif specific[layer] <= ALPHA:
            claim = "specific"
        found.append(
            LayerAgreement(
                claim,
                within=float(within[layer]),
                between=float(between[layer]),
                difference=float(difference[layer]),
                error=float(error[layer]),
                p_agnostic=float(agnostic[layer]),
                p_specific=float(specific[layer]),
                smallest_margin=max(0.0, float(smallest[layer])),
            )
        )
    return found


def _means(similarity: Floats, first: np.ndarray) -> tuple[Floats, Floats]:
    """[..., L] within and between arms, of [..., L, M, M]; the arms count alike within."""
    parts = []
    for arm in (first, ~first):
        own = similarity[..., arm, :][..., :, arm]
        above = np.triu_indices(own.shape[-1], 1)
        parts.append(own[..., above[0], above[1]].mean(-1))
    between = similarity[..., first, :][..., :, ~first].mean((-2, -1))
    return (parts[0] + parts[1]) / 2, between


def _difference(similarity: Floats, first: np.ndarray) -> Floats:
    within, between = _means(similarity, first)
    return within - between


def _error(whole: Floats, first: np.ndarray, by_block: ArrayLike | None) -> tuple[Floats, Floats]:
    """[L] standard errors of D and their degrees of freedom (Satterthwaite 1946)."""
    parts, freedoms = [np.zeros(len(whole))], 0
    for arm in (first, ~first):
        places = np.flatnonzero(arm)
        left_out = []
        for place in places:
            kept = np.arange(len(first)) != place
            left_out.append(_difference(whole[:, kept][:, :, kept], first[kept]))
        parts[0] += _jackknife(np.array(left_out))
        freedoms += len(places) - 1
    freedom = [freedoms]
    if by_block is not None:
        blocks = _difference(np.asarray(by_block, np.float64), first)
        parts.append(_jackknife(blocks))
        freedom.append(len(blocks) - 1)
    variance = np.sum(parts, axis=0)
    below = sum(part**2 / df for part, df in zip(parts, freedom, strict=True))
    together = np.full(len(whole), float(freedoms))
    np.divide(variance**2, below, out=together, where=below > 0)
    return np.sqrt(variance), together


def _jackknife(left_out: Floats) -> Floats:
    """[L] the variance that estimates [n, L] with one of n left out tell of."""
    n = len(left_out)
    return (n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0)


def _p(beyond: Floats, error: Floats, freedom: Floats) -> tuple[Floats, Floats]:
    """[L] p of "the truth is the margin or more" and "or less"; `beyond`: what D is above it."""
    t = np.divide(beyond, error, out=np.sign(beyond) * np.inf, where=error > 0)
    t = np.nan_to_num(t, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return student.cdf(t, freedom), student.sf(t, freedom)
