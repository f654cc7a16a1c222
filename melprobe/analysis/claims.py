"""Claims about layers, each a test: a figure of theirs is below a margin, or it is above.

That a block isn't needed is a claim of non-inferiority: the whole of what can be said against it,
"its damage is the margin or more", is refused at 5 %. That it is needed is the mirror image, at the
same margin. Each kind of claim is one family over a study's layers, in which Holm's procedure
(1979) holds the chance of any false claim at 5 %. What neither test decides stays undecided.

Tests are put together before that: a claim that has to hold of several things at once (all runs of
an arm, all lines of evidence) takes the largest p of all and no correction (intersection-union,
Berger 1982); one that has to hold of any takes the smallest, times how many there are (Bonferroni).

Margins are chosen before the rows exist. Beside each claim stands the smallest margin at which it
would have passed, for readers who would have chosen another, and the margin that a study of this
size could have detected.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from scipy.stats import norm

from melprobe.analysis.statistics import Floats

ALPHA = 0.05
POWER = 0.8
_STEPS = 20  # halvings: a millionth of the largest margin that is looked at

Claim = Literal["below", "above", "undecided"]


class Testable(Protocol):
    """A figure of each of L layers that can be tested against a margin."""

    @property
    def values(self) -> Floats:
        """[L] estimates"""

    @property
    def errors(self) -> Floats:
        """[L] their standard errors, infinite where unknown"""

    def p_below(self, margin: float) -> Floats:
        """[L] p of "it is `margin` or more", each layer by itself."""

    def p_above(self, margin: float) -> Floats:
        """[L] p of "it is `margin` or less"."""


class _Several:
    """Of several figures the largest stands for all, and so does the largest error."""

    def __init__(self, tests: Sequence[Testable]):
        self.tests = list(tests)

    @property
    def values(self) -> Floats:
        return np.max([one.values for one in self.tests], axis=0)

    @property
    def errors(self) -> Floats:
        return np.max([one.errors for one in self.tests], axis=0)

    def p_below(self, margin: float) -> Floats:
        return np.max([one.p_below(margin) for one in self.tests], axis=0)


class AllOf(_Several):
    """All figures are below, or all are above."""

    def p_above(self, margin: float) -> Floats:
        return np.max([one.p_above(margin) for one in self.tests], axis=0)


class EitherOf(_Several):
    """All figures are below, or one of them at least is above."""

    def p_above(self, margin: float) -> Floats:
        smallest = np.min([one.p_above(margin) for one in self.tests], axis=0)
        return np.minimum(len(self.tests) * smallest, 1.0)


class TwoSided:
    """The size of a figure that may be negative: two one-sided tests (Schuirmann 1987)."""

    def __init__(self, tests: Testable):
        self.tests = tests

    @property
    def values(self) -> Floats:
        return np.abs(self.tests.values)

    @property
    def errors(self) -> Floats:
        return self.tests.errors

    def p_below(self, margin: float) -> Floats:
        return np.maximum(self.tests.p_below(margin), self.tests.p_above(-margin))

    def p_above(self, margin: float) -> Floats:
        smaller = np.minimum(self.tests.p_above(margin), self.tests.p_below(-margin))
        return np.minimum(2 * smaller, 1.0)


class InMargins:
    """A figure in units of its own margin, so that figures with several can be put together."""

    def __init__(self, tests: Testable, margin: float):
        self.tests, self.margin = tests, margin

    @property
    def values(self) -> Floats:
        return self.tests.values / self.margin

    @property
    def errors(self) -> Floats:
        return self.tests.errors / self.margin

    def p_below(self, margin: float) -> Floats:
        return self.tests.p_below(margin * self.margin)

    def p_above(self, margin: float) -> Floats:
        return self.tests.p_above(margin * self.margin)


class LayerClaim(NamedTuple):
    """What is claimed of a layer's figure."""

    claim: Claim
    p_below: float
    """of "it is the margin or more", over all layers (Holm)"""
    p_above: float
    """of "it is the margin or less", over all layers (Holm)"""
    smallest_margin: float | None
    """at which it would be claimed to be below; None where no margin would do"""


def holm(p: Floats) -> Floats:
    """[L] p adjusted so that refusing those up to alpha is false anywhere with that chance at most.

    Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def claims(tests: Testable, margin: float, alpha: float = ALPHA) -> list[LayerClaim]:
    """Of each layer that is tested; those that are zero by construction aren't claimed,

    so leave them out of `tests`: they would make the others' claims easier.
    """
    below, above = holm(tests.p_below(margin)), holm(tests.p_above(margin))
    smallest = smallest_margins(tests, alpha)
    found = []
    for layer, (p_below, p_above) in enumerate(zip(below.tolist(), above.tolist(), strict=True)):
        claim: Claim = "undecided"
        if p_below <= alpha:
            claim = "below"
        elif p_above <= alpha:
            claim = "above"
        at = smallest[layer]
        found.append(LayerClaim(claim, p_below, p_above, float(at) if np.isfinite(at) else None))
    return found


def smallest_margins(tests: Testable, alpha: float = ALPHA) -> Floats:
    """[L] the smallest margin, 0 or more, at which "below" passes for all layers tested at it.

    Infinite where none does.
    """
    spread = np.where(np.isfinite(tests.errors), tests.errors, 0.0)
    high = max(float(np.nan_to_num(tests.values + 40 * spread).max()), 1.0)
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


def detectable_margins(tests: Testable, alpha: float = ALPHA, power: float = POWER) -> Floats:
    """[L] the margin at which a layer whose figure is zero would be claimed with that chance.

    By the normal approximation and Bonferroni's share of alpha, so a little too large.
    """
    reach = norm.ppf(1 - alpha / len(tests.values)) + norm.ppf(power)
    return reach * tests.errors
