"""`--suite open-asr`: the leaderboard's sets as far as they can be reached, and ours beside them.

A set's rows lie in one file, `open-asr/MODEL_…_DATASET_….jsonl`, which is there only when the set
is complete; so a run that was stopped goes on with the next one. Sets of this package go to
`local/`: the leaderboard's scorer takes every file below the folder that it is given, and they are
no part of its mean. What a model has no room for is cut off the end of a clip, as the leaderboard
does with Whisper's 30 s; the words said there then count as errors.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from melprobe.analysis import wer
from melprobe.analysis.protocol import choose
from melprobe.audio.load import SAMPLE_RATE, BadAudio, load_utterance
from melprobe.corpus.hub import NotReached, NotReadable, decode, stream
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest, write_records
from melprobe.errors import UsageError
from melprobe.evaluation.hearing import Model
from melprobe.evaluation.open_asr import (
    GENERATIONS,
    LATEST,
    SetName,
    counts,
    normalise,
    rows_name,
)
from melprobe.evaluation.rows import Batched, Row
from melprobe.evaluation.suite_scores import print_tables, score_sets

LOCAL = tuple(
    SetName("melprobe", name, "test")
    for name in ("asterisk", "queen", "synth-words", "synth-wordnet", "builtin")
)
CHUNK_SECONDS = 600.0
"""Audio that is in memory at a time: a set may last a hundred hours."""


class Clip(NamedTuple):
    """A recording and its normalised reference; wave is float32, mono, 16 kHz."""

    name: str
    reference: str
    wave: np.ndarray


Unloaded = tuple[str, str, Callable[[], np.ndarray]]
"""Name, normalised reference, and what loads the wave."""


def evaluate(options: argparse.Namespace) -> None:
    """Transcribe what is missing, then score all rows, write summary.json and print tables."""
    choose([], options.limit, options.seed)  # checks both
    with nullcontext(options.out) if options.out else TemporaryDirectory() as place:
        run = SuiteRun(options, Path(place))
        run.transcribe()
        run.report()


class SuiteRun:
    """One suite, one model, one folder; `summary` is what its summary.json holds."""

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out = options, out
        generation = options.generation or LATEST
        self.sets = GENERATIONS[generation]
        self.summary: dict[str, Any] = {
            "suite": options.suite,
            "generation": generation,
            "checkpoint": options.checkpoint,
            "limit": options.limit,
            "seed": options.seed,
        }
        self.unreached: dict[str, str] = {}
        self._refuse_other_results()
        self.model = Model(options.checkpoint, options.device)

    def _refuse_other_results(self) -> None:
        """A folder belongs to one model and one choice of clips."""
        path = self.out / "summary.json"
        old: Any = {}
        if path.exists():
            try:
                old = json.loads(path.read_bytes())
                there = {name: old[name] for name in self.summary}
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{path}: not a summary of --suite; take another --out") from None
            for name, value in self.summary.items():
                if there[name] != value:
                    raise UsageError(
                        f"--out {self.out}: holds results with {name} {there[name]}, not {value};"
                        " take another --out"
                    )
        self.summary["notes"] = old.get("notes", {})

    def rows_path(self, test_set: SetName) -> Path:
        group = "local" if test_set in LOCAL else "open-asr"
        return self.out / group / rows_name(self.options.checkpoint, test_set)

    def transcribe(self) -> None:
        """Write the rows of every set that is reached and has none yet."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._save()  # says whose rows these are
        gone: dict[str, str] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("")
            for test_set in (*self.sets, *LOCAL):
                progress.update(bar, description=test_set.label)
                if self.rows_path(test_set).exists():
                    continue
                if reason := gone.get(test_set.dataset):
                    self.unreached[test_set.label] = reason
                    continue
                try:
                    self._transcribe(test_set, progress)
                except NotReached as error:
                    # Asking for its other configurations would take as long and say the same.
                    gone[test_set.dataset] = self.unreached[test_set.label] = str(error)
                except NotReadable as error:
                    self.unreached[test_set.label] = str(error)

    def _transcribe(self, test_set: SetName, progress: Progress) -> None:
        rows: list[Row] = []
        left_out: list[str] = []
        rule = wer.normalise if test_set in LOCAL else normalise
        cut = done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            label = f"{test_set.label}, {done} clips"
            progress.update(progress.task_ids[0], description=label)

        batched = Batched(self.model, self.options.batch_seconds, advance)
        for clips in _chunks(self._clips(test_set, left_out)):
            most = self.model.most  # loads the model, which belongs to no clip's time
            cut += sum(len(clip.wave) > most for clip in clips)
            heard, seconds = batched([clip.wave for clip in clips])
            rows += [
                {
                    "audio_filepath": clip.name,
                    "duration": len(clip.wave) / SAMPLE_RATE,
                    "time": spent,
                    "text": clip.reference,
                    "pred_text": rule(text),
                }
                for clip, text, spent in zip(clips, heard, seconds, strict=True)
            ]
        if not rows:
            raise NotReadable(f"{test_set.dataset}, {test_set.label}: no usable clip")
        write_records(self.rows_path(test_set), rows)
        self.summary["notes"][test_set.label] = {"cut": cut, "left_out": left_out}
        self._save()

    def _clips(self, test_set: SetName, left_out: list[str]) -> Iterator[Clip]:
        """The clips that count; of bad audio, if that doesn't end the run, a line each."""
        clips = self._local(test_set) if test_set in LOCAL else self._hub(test_set)
        for name, reference, load in clips:
            try:
                yield Clip(name, reference, load())
            except BadAudio as error:
                if self.options.on_bad_audio == "error":
                    raise
                left_out.append(str(error))

    def _hub(self, test_set: SetName) -> Iterator[Unloaded]:
        """The first `--limit` of a hub's set: the leaderboard doesn't draw them either."""
        rows = stream(*test_set, ["audio", "text"], "audio")
        scored = (row for row in rows if counts(normalise(str(row["text"] or ""))))
        for number, row in enumerate(islice(scored, self.options.limit or None)):
            where = f"{test_set.dataset}, {test_set.label}, sample {number}"
            yield f"sample_{number}", normalise(row["text"]), partial(decode, row["audio"], where)

    def _local(self, test_set: SetName) -> Iterator[Unloaded]:
        """The same clips, and the same words in them, as `evaluate` on the manifest takes."""
        for u in choose(_utterances(test_set), self.options.limit, self.options.seed):
            yield u.id, wer.normalise(u.text), partial(load_utterance, u)

    def report(self) -> None:
        """Scores from the rows alone, into summary.json and tables."""
        sets = [s for s in self.sets if self.rows_path(s).exists()]
        local = [s for s in LOCAL if self.rows_path(s).exists()]
        files = {s.label: self.rows_path(s) for s in (*sets, *local)}
        voices = {s.label: _speakers(s) for s in local}
        scores, mean = score_sets(files, voices, {s.label for s in sets}, self.options.seed)
        self.summary |= {
            "sets": {s.label: scores[s.label] for s in sets},
            "mean": mean and {**mean, "of": len(self.sets)},
            "local": {s.label: scores[s.label] for s in local},
            "unreached": self.unreached,
        }
        self._save()
        print_tables(self.summary)

    def _save(self) -> None:
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")


def _speakers(test_set: SetName) -> dict[str, str]:
    """Who speaks each clip of one of our sets."""
    try:
        return {u.id: u.speaker for u in _utterances(test_set)}
    except NotReadable:  # its rows are left of a corpus that is gone
        return {}


def _utterances(test_set: SetName) -> list[Utterance]:
    try:
        return read_manifest(find_manifest(f"{test_set.config}/{test_set.split}"))
    except UsageError:
        kind = test_set.config.partition("-")[0]
        raise NotReadable(f"not built; `python -m melprobe.corpus build {kind}`") from None


def _chunks(clips: Iterator[Clip]) -> Iterator[list[Clip]]:
    """Lists of up to CHUNK_SECONDS of audio, and one clip at least."""
    chunk: list[Clip] = []
    seconds = 0.0
    for clip in clips:
        chunk.append(clip)
        seconds += len(clip.wave) / SAMPLE_RATE
        if seconds >= CHUNK_SECONDS:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk
