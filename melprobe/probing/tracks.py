"""One label for each row of a capture: what is said, by whom, how high and how loud, and when.

A patch stands for the span that `melprobe.audio.patches` gives it, and has the label that sounds
for most of it. What is not known (no time given, no patch there) is `UNKNOWN` or NaN.

Shapes: N rows of a capture, K numbers of a label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melprobe.corpus.manifest import Span
from melprobe.corpus.phones import CLASSES, SILENCE, fold

UNKNOWN = -1
RATE_WINDOW = 0.625
"""Seconds: three or four syllables."""

# Manner of articulation (Ladefoged & Johnson, A Course in Phonetics) of ARPAbet's 39 phones.
BROAD = {
    **dict.fromkeys(("sil",), "silence"),
    **dict.fromkeys(("iy", "ih", "ey", "eh", "ae", "aa", "ao", "ow", "uh", "uw"), "vowel"),
    **dict.fromkeys(("ah", "er", "aw", "ay", "oy"), "vowel"),
    **dict.fromkeys(("p", "b", "t", "d", "k", "g"), "stop"),
    **dict.fromkeys(("ch", "jh"), "affricate"),
    **dict.fromkeys(("f", "v", "th", "dh", "s", "z", "sh", "zh", "hh"), "fricative"),
    **dict.fromkeys(("m", "n", "ng"), "nasal"),
    **dict.fromkeys(("l", "r", "w", "y"), "approximant"),
}
"""Phone → broad class."""


@dataclass(frozen=True, slots=True)
class Track:
    """One label of all rows of a capture."""

    name: str
    values: NDArray[Any]
    """class numbers (N,) int64 with `UNKNOWN`, or numbers (N, K) float32 with NaN"""
    classes: tuple[str, ...] = ()
    """names of the classes; none where the label is a number"""
    speakers_apart: bool = True
    """False for what only the training speakers can show: who it is"""

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N,)"""
        of_classes = self.values.ndim == 1  # of which there may be none
        found = self.values >= 0 if of_classes else np.isfinite(self.values).all(1)
        return np.asarray(found)


def majority(spans: Sequence[Span], edges: NDArray[np.float64]) -> list[str | None]:
    """The label that covers most of each interval, None where most of it is covered by none.

    edges (P + 1,) bound the P intervals, seconds. Of labels that cover as much the earlier wins,
    over none any; pieces of one label in one interval add up.
    """
    shares: list[dict[str | None, float]] = [{} for _ in range(len(edges) - 1)]
    for label, start, end in spans:
        first = max(int(np.searchsorted(edges, start, "right")) - 1, 0)
        for patch in range(first, len(shares)):
            if edges[patch] >= end:
                break
            overlap = min(end, edges[patch + 1]) - max(start, edges[patch])
            if overlap > 0:
                shares[patch][label] = shares[patch].get(label, 0.0) + overlap
    found = []
    for share, seconds in zip(shares, np.diff(edges), strict=True):
        share[None] = seconds - sum(share.values())
        # Rounded, or the last bit of a time decides between equals; max takes the first of them.
        found.append(max(share, key=lambda label: round(share[label], 9)))
    return found


def with_silence(phones: Sequence[Span], end: float) -> list[Span]:
    """ARPAbet phones and, wherever none sounds between 0 and `end` seconds, silence.

    A label that stands for two phones gives each half of its time. Raises UsageError for a label
    that `fold` doesn't know.
    """
    found, now = list[Span](), 0.0
    for label, start, stop in phones:
        if start > now:
            found.append(Span(SILENCE, now, start))
        parts = fold(label)
        step = (stop - start) / len(parts)
        found += [Span(p, start + i * step, start + (i + 1) * step) for i, p in enumerate(parts)]
        now = max(now, stop)
    return [*found, Span(SILENCE, now, end)] if end > now else found


def speaking_rate(
    sounds: Sequence[Span], edges: NDArray[np.float64], end: float
) -> NDArray[np.float64]:
    """Local articulation rate at each interval, phones a second: (P, 1).

    Phones in a window of `RATE_WINDOW` around the interval's middle, those at its edges by the
    share that lies inside, over the time in which they sound, so that a pause is not slowness: the
    local phone rate of Pfitzinger 1998 ("Local speech rate as a combination of syllable and phone
    rate", ICSLP). NaN where phones sound for less than half of the window, of which what lies
    before or behind the clip is no part.

    sounds: of `with_silence`; edges (P + 1,): bounds of the intervals; end: of the clip; seconds.
    """
    phones = [(s.start, s.end) for s in sounds if s.label != SILENCE and s.end > s.start]
    starts, ends = np.array(phones).reshape(-1, 2).T
    middles = ((edges[:-1] + edges[1:]) / 2)[:, None]
    low = np.maximum(middles - RATE_WINDOW / 2, 0)
    high = np.minimum(middles + RATE_WINDOW / 2, end)
    inside = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None)  # (P, phones)
    sounding = inside.sum(1, keepdims=True)
    number = (inside / (ends - starts)).sum(1, keepdims=True)
    enough = sounding >= (high - low) / 2
    return np.divide(number, sounding, out=np.full_like(number, np.nan), where=enough)


def class_track(
    name: str, labels: Sequence[str | None], classes: Sequence[str] = (), **options: bool
) -> Track:
    """A track of labels (N,), None where unknown; classes: all there can be, or those there are."""
    names = tuple(classes) or tuple(sorted({label for label in labels if label is not None}))
    number = {label: i for i, label in enumerate(names)}
    values = [UNKNOWN if label is None else number[label] for label in labels]
    return Track(name, np.array(values, np.int64), names, **options)


def phone_tracks(phones: Sequence[str | None]) -> list[Track]:
    """`phone` and `class`, from the phone at each row."""
    broad = [None if phone is None else BROAD[phone] for phone in phones]
    return [
        class_track("phone", phones, CLASSES),
        class_track("class", broad, tuple(dict.fromkeys(BROAD.values()))),
    ]


def control_name(name: str) -> str:
    """The name of a label's control task."""
    return f"control:{name}"


def is_control(name: str) -> bool:
    return name.startswith(control_name(""))


def control(track: Track, words: Sequence[str | None], seed: int) -> Track:
    """The control task of a track (Hewitt & Liang 2019, arXiv 1909.03368), `control:NAME`.

    Each word type, and the silence between words as one more, gets one label, drawn at random with
    the shares that labels have in the track: what a probe gets right here it has memorised. Rows
    are those of the track at which the word is known.
    """
    known = track.known
    rng = np.random.default_rng(seed)
    types = sorted({word for word in words if word is not None})
    drawn = dict(zip(types, rng.choice(track.values[known], len(types)), strict=True))
    values = [UNKNOWN if word is None else int(drawn[word]) for word in words]
    kept = np.where(known, np.array(values, np.int64), UNKNOWN)
    return Track(control_name(track.name), kept, track.classes, track.speakers_apart)


def per_patch(
    frames: NDArray[np.float64],
    frames_per_patch: int,
    count: int,
    pool: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """What `pool` makes of each patch's frames, of (T, K): (count, K), NaN behind the last."""
    pieces = [frames[i * frames_per_patch :][:frames_per_patch] for i in range(count)]
    nothing = np.full(frames.shape[1], np.nan)
    return np.array([pool(piece) if len(piece) else nothing for piece in pieces])


def mean_of_most(piece: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the frames (t, K) that are known, NaN unless they are at least half."""
    known = piece[np.isfinite(piece).all(1)]
    return known.mean(0) if 2 * len(known) >= len(piece) else np.full(piece.shape[1], np.nan)


def frequent(track: Track, groups: Mapping[str, NDArray[np.bool_]], least: int) -> Track:
    """The track with the classes that have at least `least` rows in each group; others unknown."""
    counts = [
        np.bincount(track.values[rows & track.known], minlength=len(track.classes))
        for rows in groups.values()
    ]
    kept = np.flatnonzero(np.min(counts, axis=0) >= least)
    number = np.full(len(track.classes) + 1, UNKNOWN)  # the last is that of UNKNOWN
    number[kept] = np.arange(len(kept))
    names = tuple(track.classes[i] for i in kept)
    return Track(track.name, number[track.values], names, track.speakers_apart)
