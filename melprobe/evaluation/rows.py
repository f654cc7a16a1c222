"""Rows, one an utterance, and the scores that follow from them alone.

Their fields are those of the Open ASR Leaderboard: `audio_filepath, duration, time, text,
pred_text`, durations and times in seconds.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melprobe.analysis.statistics import Bootstrap, Interval
from melprobe.analysis.wer import WordErrors, corpus_wer, count_errors
from melprobe.audio.load import SAMPLE_RATE
from melprobe.corpus.manifest import Utterance, read_records
from melprobe.errors import UsageError
from melprobe.model.inference import batches_by_length

Row = dict[str, Any]
Transcriber = Callable[[list[np.ndarray]], list[str]]


class Batched:
    """Transcribes waves in batches of like length; returns (transcripts, seconds per clip)."""

    def __init__(
        self, transcriber: Transcriber, batch_seconds: float, advance: Callable[[int], None]
    ):
        self.transcriber = transcriber
        self.most = int(batch_seconds * SAMPLE_RATE)
        self.advance = advance

    def __call__(self, waves: Sequence[np.ndarray]) -> tuple[list[str], list[float]]:
        heard, seconds = [""] * len(waves), [0.0] * len(waves)
        for batch in batches_by_length([len(wave) for wave in waves], self.most):
            start = time.perf_counter()
            transcripts = self.transcriber([waves[i] for i in batch])
            share = (time.perf_counter() - start) / len(batch)
            for i, transcript in zip(batch, transcripts, strict=True):
                heard[i], seconds[i] = transcript, share
            self.advance(len(batch))
        return heard, seconds


def make_rows(
    utterances: Sequence[Utterance],
    waves: Sequence[np.ndarray],
    heard: list[str],
    seconds: list[float],
) -> list[Row]:
    """One row an utterance."""
    return [
        {
            "audio_filepath": str(u.id),
            "duration": len(wave) / SAMPLE_RATE,
            "time": spent,
            "text": u.text,
            "pred_text": hypothesis,
        }
        for u, wave, hypothesis, spent in zip(utterances, waves, heard, seconds, strict=True)
    ]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or UsageError that names the line that is none."""
    kinds = {"audio_filepath": str, "text": str, "pred_text": str, "duration": float, "time": float}
    rows = []
    for where, row in read_records(path):
        if wrong := [field for field, kind in kinds.items() if type(row.get(field)) is not kind]:
            raise UsageError(f"{where}: {wrong[0]}: missing or of another kind; not evaluate's row")
        rows.append(row)
    return rows


def row_errors(row: Row) -> WordErrors:
    return count_errors(row["text"], row["pred_text"])


def score(rows: list[Row], speakers: list[str], seed: int) -> dict[str, Any]:
    """WER with a 95 % bootstrap interval, errors by kind, and RTFx, from rows alone."""
    errors = [row_errors(row) for row in rows]
    return {
        **score_errors(errors, Bootstrap(speakers, seed=seed)),
        "speakers": len(set(speakers) - {""}),
        "rtfx": rtfx(rows),
    }


def score_errors(errors: list[WordErrors], bootstrap: Bootstrap) -> dict[str, Any]:
    """WER with its interval, and errors by kind."""
    wer = bootstrap.rate([e.total for e in errors], [e.reference_words for e in errors])
    return {
        "wer": wer.value,
        "wer_ci": limits(wer),
        "resampled": bootstrap.unit,
        "utterances": len(errors),
        **{kind: sum(getattr(e, kind) for e in errors) for kind in WordErrors.__slots__},
    }


def limits(interval: Interval) -> list[float] | None:
    """[low, high], or None where nothing bounds it."""
    bounded = math.isfinite(interval.low) and math.isfinite(interval.high)
    return [interval.low, interval.high] if bounded else None


def rtfx(rows: list[Row]) -> float:
    """Seconds of audio heard in a second."""
    return sum(row["duration"] for row in rows) / sum(row["time"] for row in rows)


def by_speaker(errors: list[WordErrors], speakers: list[str]) -> dict[str, dict[str, float]]:
    """WER of each speaker that is named, the worst first, and on how many reference words."""
    of: dict[str, list[WordErrors]] = {}
    for speaker, found in zip(speakers, errors, strict=True):
        if speaker:
            of.setdefault(speaker, []).append(found)
    scores = {
        speaker: {"wer": corpus_wer(found), "words": sum(e.reference_words for e in found)}
        for speaker, found in of.items()
        if sum(e.reference_words for e in found)
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1]["wer"]))
