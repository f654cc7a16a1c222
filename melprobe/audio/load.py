"""Recordings to waves: whatever libsndfile reads becomes mono float32 at 16 kHz, or a clear error.

libsndfile shortens a truncated file without a word, so lengths are held against the file's own
header (WAV, FLAC, MP3) or end mark (Ogg) and against the manifest. What it cannot know: whether the
words match the text.
"""

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from melprobe.corpus.manifest import Bytes, Utterance
from melprobe.errors import UsageError

SAMPLE_RATE = 16_000
OFF_BY_SECONDS = 0.05
"""What may be missing before a file counts as cut short, or be too much; codecs pad by less."""
SHORTEST_SECONDS = 0.05
"""No word is shorter, and one mel window (25 ms) fits even at a faster playing speed."""
SILENT_RMS = 1e-4
"""-80 dB of full scale: three steps of a 16-bit recording."""
LOUDEST = 100.0
"""Times full scale: beyond it a file's numbers are not samples in [-1, 1] at all."""
STREAM_BYTES = 0x7FFFF000
"""Programs that write to a pipe, such as sox and espeak-ng, state this many bytes or more, or 0."""


class BadAudio(UsageError):
    """A recording that cannot be used; the message names manifest line, file and reason."""


def load_wave(
    path: str | Path, *, expected_seconds: float | None = None, where: str = ""
) -> np.ndarray:
    """Read a recording: float32 [N], mono (channels averaged), 16 kHz.

    Raises BadAudio when the file is missing, empty, not audio, cut short (against its header or
    against `expected_seconds`), longer than `expected_seconds`, too short, silent, or holds NaN or
    infinity. `where` (`manifest.jsonl:12`) goes in front of the message.
    """
    name = f"{where}: {path}" if where else str(path)
    return decode_wave(read_bytes(Path(path), name), name, expected_seconds=expected_seconds)


def read_bytes(path: Path, name: str, within: Bytes | None = None) -> bytes:
    """A file, or some bytes of it and no others; `name` goes in front of a BadAudio's message."""
    try:
        # A buffer would read on, and the system ahead of it: of a tar four times what was asked.
        with path.open("rb", buffering=0) as file:
            if within is None:
                return file.read()
            # First, since as much memory is taken as is asked for.
            there = os.fstat(file.fileno()).st_size
            if within.offset + within.size > there:
                raise BadAudio(f"{name}: the file ends before that, it has {there} bytes")
            file.seek(within.offset)
            return file.read(within.size)
    except FileNotFoundError:
        raise BadAudio(f"{name}: the file is missing") from None
    except ValueError:  # a NUL, or half a character
        raise BadAudio(f"{name!r}: no file can have this name") from None
    except OSError as error:
        raise BadAudio(f"{name}: cannot be read ({error.strerror})") from None


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
    if data.startswith(b"OggS") and not _ogg_ends(data):
        raise BadAudio(f"{name}: cut short: it has no last page")
    seconds = len(samples) / rate
    promised_seconds = max(promised / rate, seconds * _stated_share(data))
    for source, expected in (("its header", promised_seconds), ("the manifest", expected_seconds)):
        if expected is not None and seconds < expected - OFF_BY_SECONDS:
            has = f"{seconds:.2f} s of the {expected:.2f} s that {source} states"
            raise BadAudio(f"{name}: cut short: {has}")
    if expected_seconds is not None and seconds > expected_seconds + OFF_BY_SECONDS:
        has = f"{seconds:.2f} s, but the manifest states {expected_seconds:.2f} s"
        raise BadAudio(f"{name}: too long: {has}")
    wave = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE) if len(samples) else samples
    if not len(wave):
        raise BadAudio(f"{name}: the file holds no samples")
    if len(wave) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise BadAudio(
            f"{name}: {seconds:.3f} s is too short, at least {SHORTEST_SECONDS} s needed"
        )
    if not np.isfinite(wave).all():
        raise BadAudio(f"{name}: holds NaN or infinite samples")
    if (loudest := float(np.abs(wave).max())) > LOUDEST:
        raise BadAudio(
            f"{name}: samples reach {loudest:.0e} times full scale; divide them by what full scale "
            "was meant to be, such as 32768"
        )
    level = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    if level < SILENT_RMS:
        of_channels = np.sqrt(np.mean(samples**2, axis=0))
        if of_channels.max() > SILENT_RMS * samples.shape[1]:
            raise BadAudio(f"{name}: its channels cancel each other; save one of them alone")
        raise BadAudio(f"{name}: silent (RMS {level:.1e} of full scale)")
    return wave


def _stated_share(data: bytes) -> float:
    """The audio bytes that a WAV file's header states over those that are there; 1 where unknown.

    libsndfile corrects what the header states by what there is.
    """
    if data[:4] not in (b"RIFF", b"RF64"):
        return 1.0
    at, long_size = 12, 0
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if kind == b"ds64":  # RF64 keeps sizes beyond 32 bits here
            long_size = int.from_bytes(data[at + 8 : at + 16], "little")
        if kind == b"data":
            stated = long_size or (size if size < STREAM_BYTES else 0)
            return stated / max(1, len(data) - at)
        at += size + size % 2
    return 1.0


def _ogg_ends(data: bytes) -> bool:
    """Whether the last page is there whole and marked as the last."""
    at = data.rfind(b"OggS")
    segments = data[at + 27 : at + 27 + data[at + 26]] if at + 26 < len(data) else b""
    return bool(
        segments and data[at + 5] & 4 and at + 27 + len(segments) + sum(segments) <= len(data)
    )


def load_utterance(u: Utterance) -> np.ndarray:
    """The wave of one utterance, float32 [N] at 16 kHz, held against the manifest's duration."""
    return decode_wave(recording_bytes(u), u.place, expected_seconds=u.duration)


def recording_bytes(u: Utterance) -> bytes:
    """The audio file of an utterance, also where it lies in a shard. Raises BadAudio."""
    return read_bytes(u.audio, u.place, u.bytes)


def load_usable(
    utterances: Iterable[Utterance],
    on_bad: Literal["error", "skip"],
    load: Callable[[Utterance], np.ndarray] = load_utterance,
) -> tuple[list[Utterance], list[np.ndarray], list[str]]:
    """Load all: (utterances, their waves, one line of reason for each that was left out).

    With `on_bad="error"` the first bad recording raises; with "skip", having none left does.
    load: what gives an utterance's wave, or what is to stand for it.
    """
    usable: list[Utterance] = []
    waves: list[np.ndarray] = []
    left_out: list[str] = []
    for utterance in utterances:
        try:
            wave = load(utterance)
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
