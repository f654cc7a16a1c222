"""Label tracks of a capture: from its manifest's times and speakers, and from the waves themselves.

Neither the capture's command nor its model is needed, only the manifest whose clips were heard.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from melprobe.audio.load import load_utterance
from melprobe.audio.mel import WINDOW, log_mel
from melprobe.audio.patches import FRAMES_PER_PATCH, patch_at, patch_span
from melprobe.captured import Capture
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.voices import sex_of, voice_of
from melprobe.errors import UsageError
from melprobe.probing.pitch import energy, pitch
from melprobe.probing.tracks import (
    Track,
    class_track,
    majority,
    mean_of_most,
    per_patch,
    phone_tracks,
    with_silence,
)

LABELS = ("phone", "class", "word", "speaker", "sex", "f0", "energy", "mel", "time")
"""All there are. f0 in octaves above 100 Hz, energy in dB, mel 80 log powers, time in seconds."""
CLASSED = LABELS[:5]
"""Those of them that are classes."""
NO_WORD = ""
"""The word at a patch between words."""


class Labelled(NamedTuple):
    """What is known of a capture's rows, N of them."""

    utterance: NDArray[np.int64]
    """(N,) number of each row's utterance among the capture's"""
    utterances: list[Utterance]
    """the capture's, in its order"""
    voices: list[str]
    """whose voice each utterance is"""
    tracks: dict[str, Track]
    words: list[str | None]
    """the word at each row, `NO_WORD` between words, None where unknown"""
    patches: NDArray[np.float32]
    """(N, r·M) log-mel frames of each row's patch side by side; 0, as for the model, behind the
    last, and NaN where no patch stands"""


def label(capture: Capture, manifest: Path | None = None) -> Labelled:
    """Every track of `LABELS` for the rows of a capture.

    manifest: the one whose clips were captured, where it has moved. A label that is known nowhere
    has no known row. UsageError where the manifest lacks a clip of the capture or has another of
    its name, or where audio is missing or damaged.
    """
    path = manifest or find_manifest(capture.index["data"])
    utterances = _of_capture(capture, path)
    rows = capture.rows
    r = FRAMES_PER_PATCH[capture.index["patches_per_second"]]
    which = rows.utterance.cat.codes.to_numpy().astype(np.int64)
    seconds = rows.seconds.to_numpy().astype(np.float64)
    speech = np.flatnonzero(np.isfinite(seconds))
    patch = np.array([patch_at(seconds[i], r) for i in speech])
    counted = np.zeros(len(utterances), np.int64)
    np.maximum.at(counted, which[speech], patch + 1)
    count = [int(n) for n in counted]
    phones = [_phones(u, n, r) for u, n in zip(utterances, count, strict=True)]
    words = [_words(u, n, r) for u, n in zip(utterances, count, strict=True)]
    sounds = [_sounds(u, n, r) for u, n in zip(utterances, count, strict=True)]

    def at_rows(of_clips: Sequence[Sequence[str | None]]) -> list[str | None]:
        found: list[str | None] = [None] * len(rows)
        for i, p in zip(speech, patch, strict=True):
            found[i] = of_clips[which[i]][p]
        return found

    def numbers(pick: Callable[[_Sounds], NDArray[np.float64]]) -> NDArray[np.float32]:
        each = [pick(clip) for clip in sounds]
        found = np.full((len(rows), each[0].shape[1]), np.nan, np.float32)
        found[speech] = [each[which[i]][p] for i, p in zip(speech, patch, strict=True)]
        return found

    def of_clips(labels: Sequence[str]) -> list[str | None]:
        return at_rows([[name or None] * n for name, n in zip(labels, count, strict=True)])

    voices = [voice_of(u.speaker) for u in utterances]
    word = at_rows(words)
    tracks = [
        *phone_tracks(at_rows(phones)),
        class_track("word", [w or None for w in word]),
        class_track("speaker", of_clips(voices), speakers_apart=False),
        class_track("sex", of_clips([u.sex or sex_of(u.speaker) for u in utterances])),
        Track("f0", numbers(lambda s: s.f0)),
        Track("energy", numbers(lambda s: s.energy)),
        Track("mel", numbers(lambda s: s.mel)),
        Track("time", np.where(np.isfinite(seconds), seconds, np.nan)[:, None].astype(np.float32)),
    ]
    return Labelled(
        which,
        utterances,
        voices,
        {track.name: track for track in tracks},
        word,
        numbers(lambda s: s.patches),
    )


class _Sounds(NamedTuple):
    """What is heard in a clip, a row for each patch."""

    f0: NDArray[np.float64]
    energy: NDArray[np.float64]
    mel: NDArray[np.float64]
    patches: NDArray[np.float64]


def _of_capture(capture: Capture, path: Path) -> list[Utterance]:
    """The manifest's line for each utterance of the capture."""
    known = {u.id: u for u in read_manifest(path)}
    for name, row in capture.utterances.iterrows():
        if (u := known.get(str(name))) is None:
            raise UsageError(f"{path}: lacks {name}, which {capture.folder} heard; name its own")
        if u.text != row.text or abs(u.duration - row.duration) > 0.05:
            raise UsageError(f"{path}: {name} is not the clip that {capture.folder} heard")
    return [known[str(name)] for name in capture.utterances.index]


def _edges(count: int, r: int) -> NDArray[np.float64]:
    return np.array([patch_span(i, r)[0] for i in range(count + 1)])


def _phones(u: Utterance, count: int, r: int) -> list[str | None]:
    if not u.phones:
        return [None] * count
    edges = _edges(count, r)
    try:
        return majority(with_silence(u.phones, edges[-1]), edges)
    except UsageError as error:
        raise UsageError(f"{u.where}: {error}") from None


def _words(u: Utterance, count: int, r: int) -> list[str | None]:
    found = majority(u.words, _edges(count, r))
    return [w or NO_WORD for w in found] if u.words else [None] * count


def _sounds(u: Utterance, count: int, r: int) -> _Sounds:
    wave = load_utterance(u)
    if len(wave) < WINDOW:
        raise UsageError(f"{u.place}: shorter than one window of 25 ms")
    octaves = np.log2(pitch(wave) / 100)[:, None]
    mel = log_mel(torch.from_numpy(wave)[None])[0].double().numpy()

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x.mean(0)

    def side_by_side(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.pad(x, ((0, r - len(x)), (0, 0))).reshape(-1)

    if count > -(-len(mel) // r):
        raise UsageError(f"{u.place}: shorter than what was captured of it; capture anew")
    pieces = [mel[i * r :][:r] for i in range(count)]
    return _Sounds(
        per_patch(octaves, r, count, mean_of_most),
        per_patch(energy(wave)[:, None], r, count, mean),
        per_patch(mel, r, count, mean),
        np.array([side_by_side(piece) for piece in pieces]).reshape(count, r * mel.shape[1]),
    )
