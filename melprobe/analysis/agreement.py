"""Do the two arms of a pair agree in a layer more than chance runs of one arm do?

D_l = mean similarity of two runs of one arm − mean similarity of two runs of different arms, at
layer l. Where arms agree it is 0: another arm is no further away than another seed. That it is
below a margin is a claim of non-inferiority, that it is above one of specificity (`claims.py` says
how claims are made). What a run has by itself, such as what a probe reads in it, is compared by the
difference of the arms' means.

Their variance has two parts that are added: from the runs that happened to be trained, by leaving
out one at a time in either arm (two-sample jackknife: a run stands in many pairs, so pairs can't be
resampled), and from the clips that happened to be heard, by leaving out a block of them at a time.
Where pairs differ each by itself the first errs on the safe side, and where runs do it is exact: of
simulated studies of ten layers with the truth at the margin, 0.3 to 5.1 % claim anything
(`tests/test_agreement.py`), where 5 % were allowed.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

from melprobe.analysis.claims import ALPHA, POWER
from melprobe.analysis.statistics import Floats
from melprobe.errors import UsageError

FEWEST_RUNS = 3
Bools = NDArray[np.bool_]


class Differences:
    """A figure of each layer, with Student's t: `melprobe.analysis.claims.Testable`.

    With fewer than three runs an arm nothing is known of how runs differ, and every p is 1.
    """

    def __init__(
        self,
        of: Callable[[Floats, Bools], Floats],
        whole: Floats,
        arms: Sequence[str],
        run_axes: int,
        by_block: ArrayLike | None,
    ):
        """of: the figure [..., L] of what runs have [..., L, M] or [..., L, M, M] and a mask [M] of

        the first arm's. run_axes: 1 or 2. by_block: [K, ...], the same without each of K blocks of
        clips; without it intervals speak of these clips only. UsageError unless there are two arms.
        """
        names = list(dict.fromkeys(arms))
        if len(names) != 2:
            raise UsageError(f"agreement is between two arms, and there are {', '.join(names)}")
        first = np.array([arm == names[0] for arm in arms])
        self.values = of(whole, first)
        self.errors = np.full(len(self.values), np.inf)
        """[L]; infinite where runs are too few"""
        self._freedom = np.ones(len(self.values))
        self.enough = bool(min(first.sum(), (~first).sum()) >= FEWEST_RUNS)
        if not self.enough:
            return

        def without(place: np.intp) -> Floats:
            kept = np.arange(len(first)) != place
            rest = whole[..., kept]
            return of(rest[:, kept] if run_axes == 2 else rest, first[kept])

        parts, freedom = [np.zeros(len(self.values))], [len(first) - 2]
        for arm in (first, ~first):
            parts[0] += _jackknife(np.array([without(place) for place in np.flatnonzero(arm)]))
        if by_block is not None:
            blocks = of(np.asarray(by_block, np.float64), first)
            parts.append(_jackknife(blocks))
            freedom.append(len(blocks) - 1)
        variance = np.sum(parts, axis=0)
        below = sum(part**2 / df for part, df in zip(parts, freedom, strict=True))
        self._freedom = np.full(len(variance), float(freedom[0]))
        # Satterthwaite 1946
        np.divide(variance**2, below, out=self._freedom, where=below > 0)
        self.errors = np.sqrt(variance)

    def p_below(self, margin: float) -> Floats:
        """[L] p of "it is `margin` or more"."""
        return student.cdf(self._t(margin), self._freedom) if self.enough else self._unknown

    def p_above(self, margin: float) -> Floats:
        """[L] p of "it is `margin` or less"."""
        return student.sf(self._t(margin), self._freedom) if self.enough else self._unknown

    def detectable(self) -> Floats:
        """[L] the margin at which a figure of zero would be claimed to be below it with a chance of

        80 %, at Bonferroni's share of alpha; infinite with too few runs.
        """
        if not self.enough:
            return self.errors
        reach = student.ppf(1 - ALPHA / len(self.values), self._freedom) + norm.ppf(POWER)
        return reach * self.errors

    @property
    def _unknown(self) -> Floats:
        return np.ones(len(self.values))

    def _t(self, margin: float) -> Floats:
        beyond = self.values - margin
        exact = np.where(beyond == 0, 0.0, np.copysign(np.inf, beyond))
        return np.divide(beyond, self.errors, out=exact, where=self.errors > 0)


def within_less_between(
    similarity: ArrayLike, arms: Sequence[str], by_block: ArrayLike | None = None
) -> Differences:
    """D of each layer.

    similarity: [L, M, M], symmetric, of M runs at L layers. arms: [M] which of two each run is of.
    by_block: [K, L, M, M], the same without each of K blocks of clips.
    """
    return Differences(_within_less_between, np.asarray(similarity, float), arms, 2, by_block)


def difference_of_means(
    scores: ArrayLike, arms: Sequence[str], by_block: ArrayLike | None = None
) -> Differences:
    """The first arm's mean score less the other's; scores: [L, M], by_block: [K, L, M]."""
    return Differences(_difference_of_means, np.asarray(scores, float), arms, 1, by_block)


def within_and_between(similarity: ArrayLike, arms: Sequence[str]) -> tuple[Floats, Floats]:
    """[L] mean similarity of runs of one arm, both arms alike, and of different arms."""
    return _means(np.asarray(similarity, float), np.array([arm == arms[0] for arm in arms]))


def _means(similarity: Floats, first: Bools) -> tuple[Floats, Floats]:
    """[..., L] within and between arms, of [..., L, M, M]; NaN within arms of one run."""
    parts = []
    for arm in (first, ~first):
        own = similarity[..., arm, :][..., :, arm]
        above = np.triu_indices(own.shape[-1], 1)
        pairs = own[..., above[0], above[1]]
        parts.append(pairs.mean(-1) if pairs.shape[-1] else np.full(pairs.shape[:-1], np.nan))
    between = similarity[..., first, :][..., :, ~first].mean((-2, -1))
    return (parts[0] + parts[1]) / 2, between


def _within_less_between(similarity: Floats, first: Bools) -> Floats:
    within, between = _means(similarity, first)
    return within - between


def _difference_of_means(scores: Floats, first: Bools) -> Floats:
    return scores[..., first].mean(-1) - scores[..., ~first].mean(-1)


def _jackknife(left_out: Floats) -> Floats:
    """[L] the variance that estimates [n, L] with one of n left out tell of."""
    n = len(left_out)
    return (n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0)
