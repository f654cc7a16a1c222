"""Recordings to waves: whatever libsndfile reads becomes mono float32 at 16 kHz, or a clear error.

libsndfile shortens a truncated file without a word, so lengths are held against the file's own
header and against the manifest. What it cannot know: whether the words match the text.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from melprobe.corpus.manifest import Utterance
from melprobe.errors import UsageError

SAMPLE_RATE = 16_000
SHORT_BY_SECONDS = 0.05
"""What may be missing at the end before a file counts as cut short; codecs pad by less."""
SHORTEST_SECONDS = 0.05
"""No word is shorter, and one mel window (25 ms) fits even at a faster playing speed."""
SILENT_RMS = 1e-4
"""-80 dB of full scale: three steps of a 16-bit recording."""


class BadAudio(UsageError):
    """A recording that cannot be used; the message names manifest line, file and reason."""


def load_wave(path: Path, *, expected_seconds: float | None = None, where: str = "") -> np.ndarray:
    """Read a recording: float32 [N], mono (channels averaged), 16 kHz.

    Raises BadAudio when the file is missing, empty, not audio, cut short (against its header or
    against `expected_seconds`), too short, silent, or holds NaN or infinity. `where`
    (`manifest.jsonl:12`) goes in front of the message.
    """
    name = f"{where}: {path}" if where else str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadAudio(f"{name}: the file is missing") from None
    except OSError as error:
        raise BadAudio(f"{name}: cannot be read ({error.strerror})") from None
    return decode_wave(data, name, expected_seconds=expected_seconds)


def decode_wave(data: bytes, name: str, *, expected_seconds: float | None = None) -> np.ndarray:
    """`load_wave` for the bytes of an audio file; `name` goes in front of the message."""
    if not data:
        raise BadAudio(f"{name}: the file is empty (0 bytes)")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        reason = f"not audio that libsndfile reads ({error.error_string.rstrip('.')})"
        raise BadAudio(f"{name}: {reason}; convert it to WAV or FLAC") from None
    with file:
        rate, promised = file.samplerate, file.frames
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise BadAudio(f"{name}: cut short or damaged ({error.error_string})") from None
    seconds = len(samples) / rate
    for source, expected in (("its header", promised / rate), ("the manifest", expected_seconds)):
        if expected is not None and seconds < expected - SHORT_BY_SECONDS:
            has = f"{seconds:.2f} s of the {expected:.2f} s that {source} states"
            raise BadAudio(f"{name}: cut short: {has}")
    wave = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE) if len(samples) else samples
    if not len(wave):
        raise BadAudio(f"{name}: the file holds no samples")
    if len(wave) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise BadAudio(
            f"{name}: {seconds:.3f} s is too short, at least {SHORTEST_SECONDS} s needed"
        )
    if not np.isfinite(wave).all():
        raise BadAudio(f"{name}: holds NaN or infinite samples")
    level = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    if level < SILENT_RMS:
        raise BadAudio(f"{name}: silent (RMS {level:.1e} of full scale)")
    return wave


def load_utterance(u: Utterance) -> np.ndarray:
    """The wave of one utterance, float32 [N] at 16 kHz, held against the manifest's duration."""
    return load_wave(u.audio, expected_seconds=u.duration, where=u.where)


def load_usable(
    utterances: Iterable[Utterance], on_bad: Literal["error", "skip"]
) -> tuple[list[Utterance], list[np.ndarray], list[str]]:
    """Load all: (utterances, their waves, one line of reason for each that was left out).

    With `on_bad="error"` the first bad recording raises; with "skip", having none left does.
    """
    usable: list[Utterance] = []
    waves: list[np.ndarray] = []
    left_out: list[str] = []
    for utterance in utterances:
        try:
            wave = load_utterance(utterance)
        except BadAudio as error:
            if on_bad == "error":
                raise
            left_out.append(str(error))
            continue
        usable.append(utterance)
        waves.append(wave)
    if left_out and not usable:
        raise BadAudio(f"all {len(left_out)} recordings are unusable; the first: {left_out[0]}")
    return usable, waves, left_out
