"""Intervals by a paired cluster bootstrap, for one figure or for a profile over layers.

Every figure here is a ratio of sums over utterances: word errors over words, nats over tokens,
damage over the damage of deafness; a mean is the ratio with ones below. Differences are taken
within an utterance before resampling, which makes the bootstrap paired.

Whole speakers are resampled where there are at least ten. With fewer, utterances are, and the
interval then speaks of *these* speakers only. Limits are studentised (bootstrap-t, DiCiccio and
Efron 1996, doi:10.1214/ss/1032280214): damage is skewed, and at thirty clips and thirty layers
bands from plain percentiles or normal errors hold the truth far too rarely. What no clip shows, no
interval knows: a cut that harms one clip in a hundred can look harmless on thirty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melprobe.errors import UsageError

ENOUGH_SPEAKERS = 10
# A resample that misses the few clips that differ shows no spread, and its t would be infinite;
# so its standard error counts as at least this share of the sample's.
LEAST_SPREAD = 1 / 3
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence limits: infinite where the data set none."""

    value: float
    low: float
    high: float

    @property
    def limits(self) -> tuple[float, float] | None:
        """None where there are none: JSON has no infinity."""
        return (self.low, self.high) if np.isfinite([self.low, self.high]).all() else None


@dataclass(frozen=True, slots=True)
class _Resampled:
    """What resampling says of ratios, a column each; R resamples, L columns."""

    errors: Floats
    """[L], standard errors of the sample's ratios"""
    shifts: Floats
    """[R, L], resampled ratio minus ratio"""
    spreads: Floats
    """[R, L], standard errors of the resampled ratios"""


class Bootstrap:
    """Resamples of one list of utterances, shared by every figure computed on them.

    `speakers` [N] names who speaks each utterance, "" where unknown (it then stands for itself).
    `unit` says what is resampled, `n_units` how many there are.
    """

    def __init__(
        self, speakers: Sequence[str], *, resamples: int = 5000, seed: int | Sequence[int] = 0
    ) -> None:
        if not speakers:
            raise UsageError("no utterances, so there is nothing to resample")
        self._unit_of, self.n_units = clusters(speakers)
        self.unit: Literal["speaker", "utterance"] = "speaker" if _enough(speakers) else "utterance"
        chances = np.full(self.n_units, 1 / self.n_units)
        draws = np.random.default_rng(seed).multinomial(self.n_units, chances, size=resamples)
        self._draws = draws.astype(np.float64)  # [R, units]: how often each resample holds a unit

    def ratio(
        self, numerator: ArrayLike, denominator: ArrayLike | None = None, confidence: float = 0.95
    ) -> Interval:
        """Σ numerator / Σ denominator, both [N], with its interval; no denominator: the mean.

        Unbounded where there is one unit, or where a resample's denominator is not positive.
        """
        return self.bands(np.asarray(numerator)[:, None], denominator, confidence)[0]

    def rate(self, counts: ArrayLike, denominator: ArrayLike) -> Interval:
        """`ratio` of what can't be negative, such as word errors: nor can its lower limit."""
        interval = self.ratio(counts, denominator)
        return replace(interval, low=max(interval.low, 0.0))

    def bands(
        self, numerators: ArrayLike, denominator: ArrayLike | None = None, confidence: float = 0.95
    ) -> list[Interval]:
        """`ratio` for each column of [N, L], with limits that hold for all columns at once (max-t).

        A column that is zero throughout has zero width and costs the others nothing.
        """
        values, resampled = self._resample(numerators, denominator)
        if resampled is None:
            return [Interval(float(value), -np.inf, np.inf) for value in values]
        low, high = _limits(resampled, confidence)
        rows = zip(values, values - high, values - low, strict=True)
        return [Interval(*map(float, row)) for row in rows]

    def tests(self, numerators: ArrayLike, denominator: ArrayLike | None = None) -> "Tests":
        """One-sided tests of each column's ratio against margins; see `Tests`."""
        values, resampled = self._resample(numerators, denominator)
        return Tests(values, resampled)

    def best_column(
        self, numerators: ArrayLike, confidence: float = 0.95
    ) -> tuple[int, tuple[int, int]]:
        """The column of [N, L] with the largest sum, and between which columns it lies.

        Limits are percentiles of the best column's number over the resamples, which takes columns
        to be in an order, such as layers. All there are where there is one unit.
        """
        totals = np.zeros((self.n_units, np.shape(numerators)[1]))
        np.add.at(totals, self._unit_of, np.asarray(numerators, np.float64))
        best = int(totals.sum(axis=0).argmax())
        if self.n_units < 2:
            return best, (0, totals.shape[1] - 1)
        tail = (1 - confidence) / 2
        each = (self._draws @ totals).argmax(axis=1)
        low, high = np.quantile(each, [tail, 1 - tail], method="closest_observation")
        return best, (int(low), int(high))

    def _resample(
        self, numerators: ArrayLike, denominator: ArrayLike | None
    ) -> tuple[Floats, _Resampled | None]:
        """The ratio of each column, and what its resamples do, or None where nothing bounds it."""
        above = np.asarray(numerators, np.float64)
        below = np.ones(len(above)) if denominator is None else np.asarray(denominator, np.float64)
        totals = np.zeros((self.n_units, above.shape[1] + 1))
        np.add.at(totals, self._unit_of, np.column_stack((above, below)))
        above_by_unit, below_by_unit = totals[:, :-1], totals[:, -1:]

        size = below_by_unit.sum()
        values = above_by_unit.sum(axis=0) / size if size > 0 else np.full(above.shape[1], np.nan)
        sizes = self._draws @ below_by_unit  # [R, 1]
        if self.n_units < 2 or (sizes <= 0).any():
            return values, None
        residuals = above_by_unit - values * below_by_unit
        errors = _spread((residuals**2).sum(axis=0), size, self.n_units)
        shifts = self._draws @ residuals / sizes  # [R, L]: resampled ratio - ratio
        squares = (
            self._draws @ residuals**2
            - 2 * shifts * (self._draws @ (residuals * below_by_unit))
            + shifts**2 * (self._draws @ below_by_unit**2)
        )
        return values, _Resampled(errors, shifts, _spread(squares, sizes, self.n_units))


class Tests:
    """Bootstrap-t tests of L ratios, each by itself: `melprobe.analysis.claims` puts them together.

    Where resampling bounds nothing (see `Bootstrap.ratio`) every p is 1. A column without any
    spread is what it is: its p is the smallest that so many resamples can give.
    """

    def __init__(self, values: Floats, resampled: _Resampled | None):
        self.values = values
        """[L] the ratios"""
        self.errors = np.full(len(values), np.inf) if resampled is None else resampled.errors
        """[L] their standard errors, infinite where unknown"""
        # [R, L], of (ratio - truth) / standard error; sorted, so that p is a place in it.
        self._t = None if resampled is None else np.sort(_studentised(resampled), axis=0)

    def p_below(self, margin: float) -> Floats:
        """[L] p of "the ratio is `margin` or more"."""
        return self._p(margin, below=True)

    def p_above(self, margin: float) -> Floats:
        """[L] p of "the ratio is `margin` or less"."""
        return self._p(margin, below=False)

    def _p(self, margin: float, *, below: bool) -> Floats:
        found = np.ones(len(self.values))
        if self._t is None:
            return found
        resamples = len(self._t)
        for i, (value, error) in enumerate(zip(self.values, self.errors, strict=True)):
            if error == 0:
                beyond = 0 if (value < margin if below else value > margin) else resamples
            elif below:
                beyond = np.searchsorted(self._t[:, i], (value - margin) / error, side="right")
            else:
                place = np.searchsorted(self._t[:, i], (value - margin) / error, side="left")
                beyond = resamples - place
            found[i] = (1 + beyond) / (1 + resamples)
        return found


def mean_of_rates(
    rates: Sequence[tuple[Bootstrap, ArrayLike, ArrayLike]], confidence: float = 0.95
) -> Interval:
    """The plain mean of several lists' rates (bootstrap, counts, denominators), such as test sets'.

    Each list is resampled by itself, so give the bootstraps as many resamples and different seeds.
    """
    each = [b._resample(np.asarray(above)[:, None], below) for b, above, below in rates]
    value = float(np.mean([values for values, _ in each]))
    found = [resampled for _, resampled in each if resampled]
    if len(found) < len(each):
        return Interval(value, -np.inf, np.inf)
    mean = _Resampled(
        np.sqrt(np.sum([r.errors**2 for r in found], axis=0)) / len(found),
        np.mean([r.shifts for r in found], axis=0),
        np.sqrt(np.sum([r.spreads**2 for r in found], axis=0)) / len(found),
    )
    low, high = _limits(mean, confidence)
    return Interval(value, max(value - float(high[0]), 0.0), value - float(low[0]))


def _limits(resampled: _Resampled, confidence: float) -> tuple[Floats, Floats]:
    """How far below and above the truth the estimate [L] may lie (max-t over the columns)."""
    t, tail = _studentised(resampled), (1 - confidence) / 2
    low = np.quantile(t.min(axis=1), tail) * resampled.errors
    return low, np.quantile(t.max(axis=1), 1 - tail) * resampled.errors


def _studentised(resampled: _Resampled) -> Floats:
    """[R, L] each resample's shift over its own standard error; 0 in a column without spread."""
    errors, shifts = resampled.errors, resampled.shifts
    spreads = np.maximum(resampled.spreads, LEAST_SPREAD * errors)
    return np.divide(shifts, spreads, out=np.zeros_like(shifts), where=errors > 0)


def _enough(speakers: Sequence[str]) -> bool:
    return len(set(speakers) - {""}) >= ENOUGH_SPEAKERS


def clusters(speakers: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """[N] number of the unit that is drawn with each utterance, and how many units there are."""
    by_speaker = _enough(speakers)
    keys = [name if by_speaker and name else i for i, name in enumerate(speakers)]
    rank = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([rank[key] for key in keys]), len(rank)


def ratio_error(above: Floats, below: Floats, unit_of: NDArray[np.int64], n_units: int) -> float:
    """Standard error of Σ above / Σ below, both [N], over clusters; 0 with a single one."""
    if n_units < 2:
        return 0.0
    residuals = np.bincount(unit_of, above - above.sum() / below.sum() * below, n_units)
    return float(_spread((residuals**2).sum(keepdims=True), below.sum(), n_units)[0])


def _spread(squares: Floats, size: Floats, units: int) -> Floats:
    """Standard error of a ratio of sums, from its summed squared residuals (linearised)."""
    return np.sqrt(np.maximum(squares, 0.0) * units / (units - 1)) / size
