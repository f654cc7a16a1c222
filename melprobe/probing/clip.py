"""What is said and heard in one clip, a row for each of its P patches.

The labels that probes are trained on, and that `corpus show` draws, are these.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from melprobe.audio.load import load_utterance
from melprobe.audio.mel import WINDOW, log_mel
from melprobe.audio.patches import patch_span
from melprobe.corpus.manifest import Span, Utterance
from melprobe.errors import UsageError
from melprobe.probing.pitch import energy, pitch
from melprobe.probing.tracks import (
    majority,
    mean_of_most,
    per_patch,
    speaking_rate,
    with_silence,
)

NO_WORD = ""
"""The word at a patch between words."""


class Said(NamedTuple):
    """From the manifest's times; unknown where it has none."""

    phones: list[str | None]
    """(P,) of `melprobe.corpus.phones.CLASSES`"""
    words: list[str | None]
    """(P,) `NO_WORD` between words"""
    rate: NDArray[np.float64]
    """(P, 1) phones a second"""


class Frames(NamedTuple):
    """From the wave, T mel frames of M bins."""

    octaves: NDArray[np.float64]
    """(T, 1) F0 above 100 Hz, NaN where it is not voiced"""
    energy: NDArray[np.float64]
    """(T, 1) dB"""
    mel: NDArray[np.float64]
    """(T, M) log power"""


class Heard(NamedTuple):
    """The same at patches."""

    f0: NDArray[np.float64]
    """(P, 1) octaves above 100 Hz, NaN unless half of the patch is voiced"""
    energy: NDArray[np.float64]
    """(P, 1) dB"""
    mel: NDArray[np.float64]
    """(P, M)"""
    patches: NDArray[np.float64]
    """(P, r·M) the frames side by side, 0 behind the last, as the model is given them"""


def edges_of(count: int, r: int) -> NDArray[np.float64]:
    """(P + 1,) seconds at which `count` patches of r frames begin and end."""
    return np.array([patch_span(i, r)[0] for i in range(count + 1)])


def said(u: Utterance, count: int, r: int) -> Said:
    """UsageError for a phone that isn't known."""
    edges = edges_of(count, r)
    words: list[str | None] = [None] * count
    if u.words:
        words = [word or NO_WORD for word in majority(u.words, edges)]
    if not u.phones:
        return Said([None] * count, words, np.full((count, 1), np.nan))
    spans = sounds_of(u, float(edges[-1]))
    return Said(majority(spans, edges), words, speaking_rate(spans, edges, u.duration))


def sounds_of(u: Utterance, end: float) -> list[Span]:
    """Its phones in ARPAbet, and the silences between them, from 0 to `end` seconds at least."""
    try:
        return with_silence(u.phones, end)
    except UsageError as error:
        raise UsageError(f"{u.where}: {error}") from None


def frames_of(u: Utterance) -> Frames:
    """UsageError where audio is missing or damaged, or shorter than one frame."""
    wave = load_utterance(u)
    if len(wave) < WINDOW:
        raise UsageError(f"{u.place}: shorter than one window of 25 ms")
    mel = log_mel(torch.from_numpy(wave)[None])[0].double().numpy()
    return Frames(np.log2(pitch(wave) / 100)[:, None], energy(wave)[:, None], mel)


def heard(frames: Frames, count: int, r: int) -> Heard:
    """The first `count` patches of r frames."""

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x.mean(0)

    bins = frames.mel.shape[1]
    pieces = [frames.mel[i * r :][:r] for i in range(count)]
    side_by_side = [np.pad(x, ((0, r - len(x)), (0, 0))).reshape(-1) for x in pieces]
    return Heard(
        per_patch(frames.octaves, r, count, mean_of_most),
        per_patch(frames.energy, r, count, mean),
        per_patch(frames.mel, r, count, mean),
        np.array(side_by_side).reshape(count, r * bins),
    )
