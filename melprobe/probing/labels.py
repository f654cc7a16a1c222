"""Label tracks of a capture: from its manifest's times and speakers, and from the waves themselves.

Neither the capture's command nor its model is needed, only the manifest whose clips were heard.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from melprobe.audio.patches import FRAMES_PER_PATCH, patch_at, patch_count
from melprobe.captured import Capture
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.voices import sex_of, voice_of
from melprobe.errors import UsageError
from melprobe.probing.clip import Heard, frames_of, heard, said
from melprobe.probing.tracks import Track, class_track, phone_tracks

CLASSED = ("phone", "class", "word", "speaker", "sex", "corpus")
"""Labels that are classes."""
LABELS = (*CLASSED, "f0", "energy", "rate", "mel", "time")
"""All there are. f0 in octaves above 100 Hz, energy in dB, rate in phones a second, mel 80 log
powers, time in seconds."""
TIMED = ("phone", "class", "word", "rate")
"""Those that come from phone and word times."""


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
    told = [said(u, n, r) for u, n in zip(utterances, count, strict=True)]
    sounds = [_heard(u, n, r) for u, n in zip(utterances, count, strict=True)]

    def at_rows(of_clips: Sequence[Sequence[str | None]]) -> list[str | None]:
        found: list[str | None] = [None] * len(rows)
        for i, p in zip(speech, patch, strict=True):
            found[i] = of_clips[which[i]][p]
        return found

    def numbers(each: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
        found = np.full((len(rows), each[0].shape[1]), np.nan, np.float32)
        found[speech] = [each[which[i]][p] for i, p in zip(speech, patch, strict=True)]
        return found

    def of_clips(labels: Sequence[str]) -> list[str | None]:
        return at_rows([[name or None] * n for name, n in zip(labels, count, strict=True)])

    voices = [voice_of(u.speaker) for u in utterances]
    word = at_rows([clip.words for clip in told])
    tracks = [
        *phone_tracks(at_rows([clip.phones for clip in told])),
        class_track("word", [w or None for w in word]),
        class_track("speaker", of_clips(voices), speakers_apart=False),
        class_track("sex", of_clips([u.sex or sex_of(u.speaker) for u in utterances])),
        class_track("corpus", of_clips([u.corpus for u in utterances])),
        Track("f0", numbers([clip.f0 for clip in sounds])),
        Track("energy", numbers([clip.energy for clip in sounds])),
        Track("rate", numbers([clip.rate for clip in told])),
        Track("mel", numbers([clip.mel for clip in sounds])),
        Track("time", np.where(np.isfinite(seconds), seconds, np.nan)[:, None].astype(np.float32)),
    ]
    return Labelled(
        which,
        utterances,
        voices,
        {track.name: track for track in tracks},
        word,
        numbers([clip.patches for clip in sounds]),
    )


def _of_capture(capture: Capture, path: Path) -> list[Utterance]:
    """The manifest's line for each utterance of the capture."""
    known = {u.id: u for u in read_manifest(path)}
    for name, row in capture.utterances.iterrows():
        if (u := known.get(str(name))) is None:
            raise UsageError(f"{path}: lacks {name}, which {capture.folder} heard; name its own")
        if u.text != row.text or abs(u.duration - row.duration) > 0.05:
            raise UsageError(f"{path}: {name} is not the clip that {capture.folder} heard")
    return [known[str(name)] for name in capture.utterances.index]


def _heard(u: Utterance, count: int, r: int) -> Heard:
    frames = frames_of(u)
    if count > patch_count(len(frames.mel), r):
        raise UsageError(f"{u.place}: shorter than what was captured of it; capture anew")
    return heard(frames, count, r)
