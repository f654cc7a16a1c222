"""Which frames stand for each other: frames of two captures at the same times, and minibatches.

Frames of two captures are matched by their `seconds`, frame by frame of the coarser one. A
minibatch holds one frame of a clip at most: frames of one clip resemble each other whatever a model
does, and debiasing takes a minibatch's frames to be independent (two half a second apart are not:
LOG.md, 2026-11-30).

Re-pairing gives the floor: each clip is held against another one of the same speaker and of like
length that says other words, frames in their order. What is still alike then is the speaker, the
place in the clip, and the smoothness of speech.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from melprobe.analysis.similarity import FEWEST
from melprobe.analysis.wer import normalise

Places = NDArray[np.int64]


class Frames(NamedTuple):
    """A clip's frames of speech, n of them."""

    places: Places
    """(n,) among the clip's rows"""
    seconds: NDArray[np.float32]
    """(n,) their middles, rising"""


FEWEST_CLIPS = 16
"""A window's: of fewer, minibatches would be small."""
_TIE = 1e-4
"""s: of two frames that are equally near, always the earlier, whatever rounding says"""


def matched(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    rates: tuple[float, float],
    lags: Sequence[int] = (0,),
) -> tuple[Places, Places]:
    """Places (n,) in a, and (lags, n) in b, of frames at the same times, and so many frames later.

    a, b: rising middles of a clip's frames in seconds; rates: frames a second of either. A lag is
    counted in frames of the coarser. Only frames of it that have a partner at every lag are there.
    """
    step = 1 / min(rates)
    times = np.asarray(a if rates[0] <= rates[1] else b, np.float64)
    if not len(a) or not len(b):
        return np.zeros(0, np.int64), np.zeros((len(lags), 0), np.int64)
    in_a, there = _nearest(a, times, step)
    in_b = np.zeros((len(lags), len(times)), np.int64)
    for row, lag in enumerate(lags):
        in_b[row], found = _nearest(b, times + lag * step, step)
        there &= found
    return in_a[there], in_b[:, there]


def _nearest(
    among: NDArray[np.float32], times: NDArray[np.float64], step: float
) -> tuple[Places, NDArray[np.bool_]]:
    """The nearest frame to each time, and whether it is within half a step."""
    middles = (among[1:].astype(np.float64) + among[:-1]) / 2
    nearest = np.searchsorted(middles, times - _TIE)
    return nearest, np.abs(among[nearest] - times) <= step / 2 + 2 * _TIE


def partners(utterances: pd.DataFrame) -> dict[str, str]:
    """For each utterance another one of its speaker, of like duration, with other words.

    utterances: text, speaker and duration by id, as of `Capture`. Those for whom there is none are
    absent. Utterances without a speaker's name count as one speaker's. A speaker's form a ring, up
    through every other duration and down through the rest, in which the next with other words is
    taken: two that were each other's partners would be as alike as they are in the real pairing.
    """
    found = {}
    for _, group in utterances.groupby(utterances.speaker.fillna("")):
        ranked = group.sort_values("duration", kind="stable")
        ring = [*ranked.index[::2], *ranked.index[1::2][::-1]]
        said = ranked.text.map(normalise)
        for place, name in enumerate(ring):
            onwards = ring[place + 1 :] + ring[:place]
            partner = next((other for other in onwards if said[other] != said[name]), None)
            if partner is not None:
                found[name] = partner
    return found


def windows(frames: Sequence[int], most: int, rng: np.random.Generator) -> list[list[int]]:
    """Numbers of clips in a drawn order, together while their frames are no more than `most`.

    So what is in memory at a time is bounded, and a minibatch still holds clips of all kinds. At
    least FEWEST_CLIPS are together, if there are so many.
    """
    found: list[list[int]] = [[]]
    size = 0
    for clip in rng.permutation(len(frames)).tolist():
        if size + frames[clip] > most and len(found[-1]) >= FEWEST_CLIPS:
            found.append([])
            size = 0
        found[-1].append(clip)
        size += frames[clip]
    if len(found) > 1 and len(found[-1]) < FEWEST_CLIPS:
        last = found.pop()
        found[-1] += last
    return found


def minibatches(frames: Sequence[int], most: int, rng: np.random.Generator) -> Iterator[Places]:
    """Places of each minibatch among the concatenated frames of a window's clips; none twice.

    Clips deal their frames, in a drawn order, to the minibatches in turn: so sizes differ by one at
    most, and as many minibatches as the longest clip has frames keep each clip's apart. Where that
    would leave less than half of the clips in one, long clips give only some of their frames.
    """
    lengths = np.array(frames, np.int64)
    least = max(FEWEST, len(lengths) / 2)
    count = int(lengths.max(initial=0))
    while count > 1 and np.minimum(lengths, count).sum() < least * count:
        count -= 1
    count = max(count, -(-int(lengths.sum()) // most))
    dealt: list[list[int]] = [[] for _ in range(count)]
    turn = first = 0
    for length in lengths.tolist():
        for place in rng.permutation(length)[:count].tolist():
            dealt[turn % count].append(first + place)
            turn += 1
        first += length
    for places in dealt:
        if len(places) >= FEWEST:
            yield np.array(places, np.int64)
