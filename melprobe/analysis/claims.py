"""Claims about layers, each a test: its damage is below a margin, or it is above.

That a block isn't needed is a claim of non-inferiority: the whole of what can be said against it,
"its damage is the margin or more", is refused at 5 %. That it is needed is the mirror image, at the
same margin. Each kind of claim is one family over a study's layers, in which Holm's procedure
(1979) holds the chance of any false claim at 5 %. What neither test decides stays undecided.

Margins are chosen before the rows exist. Beside each claim stands the smallest margin at which it
would have passed, for readers who would have chosen another, and the margin that a study of this
size could have detected.
"""

from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm

from melprobe.analysis.statistics import Floats, Tests

ALPHA = 0.05
POWER = 0.8
_STEPS = 20  # halvings: a millionth of the largest margin that is looked at

Claim = Literal["needed", "not needed", "undecided"]


class LayerClaim(NamedTuple):
    """What is claimed of a layer."""

    claim: Claim
    p_not_needed: float
    """of "the damage is the margin or more", over all layers (Holm)"""
    p_needed: float
    """of "the damage is the margin or less", over all layers (Holm)"""
    smallest_margin: float | None
    """at which it would be claimed that the layer isn't needed; None where no margin would do"""


def holm(p: Floats) -> Floats:
    """[L] p adjusted so that refusing those up to alpha is false anywhere with that chance at most.

    Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def claims(tests: Tests, margin: float, alpha: float = ALPHA) -> list[LayerClaim]:
    """Of each layer whose damage is tested; those that are zero by construction aren't claimed,

    so leave them out of `tests`: they would make the others' claims easier.
    """
    spare, costly = holm(tests.p_below(margin)), holm(tests.p_above(margin))
    smallest = smallest_margins(tests, alpha)
    found = []
    for layer, (p_spare, p_costly) in enumerate(zip(spare, costly, strict=True)):
        claim: Claim = "undecided"
        if p_spare <= alpha:
            claim = "not needed"
        elif p_costly <= alpha:
            claim = "needed"
        at = smallest[layer]
        found.append(LayerClaim(claim, p_spare, p_costly, float(at) if np.isfinite(at) else None))
    return found


def smallest_margins(tests: Tests, alpha: float = ALPHA) -> Floats:
    """[L] the smallest margin, 0 or more, at which "not needed" passes for all layers tested at it.

    Infinite where none does.
    """
    spread = np.where(np.isfinite(tests.errors), tests.errors, 0.0)
    high = max(float(np.max(tests.values + 40 * spread)), 1.0)
    found = np.full(len(tests.values), np.inf)
    for layer in np.flatnonzero(holm(tests.p_below(high)) <= alpha):
        low, passing = 0.0, high
        for _ in range(_STEPS):
            middle = (low + passing) / 2
            if holm(tests.p_below(middle))[layer] <= alpha:
                passing = middle
            else:
                low = middle
        found[layer] = passing
    return found


def detectable_margins(tests: Tests, alpha: float = ALPHA, power: float = POWER) -> Floats:
    """[L] the margin at which a layer of no damage would be claimed with that chance.

    By the normal approximation and Bonferroni's share of alpha, so a little too large.
    """
    reach = norm.ppf(1 - alpha / len(tests.values)) + norm.ppf(power)
    return reach * tests.errors
