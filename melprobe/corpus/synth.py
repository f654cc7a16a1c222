"""`melprobe.corpus build synth`: any sentences in many synthetic voices, with phone and word times.

Splits and voices are settled in `melprobe.corpus.casting`. The work is cut into parts that are
written whole or not at all, so a build that was killed goes on where it stopped.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from rich.progress import Progress

from melprobe.audio.load import SAMPLE_RATE
from melprobe.corpus.casting import ENGINES, HELD_OUT, engine, plan
from melprobe.corpus.clips import finish
from melprobe.corpus.engines import Clip, spans
from melprobe.corpus.leakage import without_leaks
from melprobe.corpus.manifest import (
    EXACT,
    Span,
    Utterance,
    find_manifest,
    read_manifest,
    write_manifest,
)
from melprobe.errors import UsageError

CLIPS_IN_PART = 200
SETTINGS = (
    *("text", "n", "dev", "test", "test_engine", "engines", "hold_out_engine"),
    *("hold_out_voices", "exclude", "seed"),
)


class Part(NamedTuple):
    """Clips that are spoken and written together."""

    folder: Path
    split: str
    number: int
    clips: tuple[Clip, ...]

    @property
    def manifest(self) -> Path:
        return self.folder / "parts" / f"{self.split}-{self.number:04d}.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build synth`."""
    add = parser.add_argument
    add(
        "--text",
        default="words",
        help="a file with a sentence a line, words, wordnet or"
        " manifest:NAME (say a training manifest's lines) or shuffled:NAME (its words in no order);"
        " default %(default)s",
    )
    add("--name", help="folder of the corpus; default synth-TEXT")
    add("--n", type=int, default=24_000, help="training clips (default %(default)s)")
    add("--dev", type=int, default=300, help="clips of unseen sentences (default %(default)s)")
    add("--test", type=int, default=400, help="clips of held-out voices (default %(default)s)")
    add(
        "--test-engine",
        type=int,
        default=300,
        help="clips of the held-out engine (default %(default)s)",
    )
    add(
        "--engines",
        default="espeak=7,flite=3",
        help="training engines and their shares (default %(default)s)",
    )
    add("--hold-out-engine", default="festival", choices=ENGINES, help="default %(default)s")
    add(
        "--hold-out-voices",
        nargs="*",
        default=list(HELD_OUT),
        metavar="ENGINE:VOICE",
        help="patterns of voices that train and dev don't have (default %(default)s)",
    )
    add(
        "--exclude",
        nargs="*",
        default=[],
        metavar="MANIFEST",
        help="tests to keep near-equal sentences of out of train, such as queen/test",
    )
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")


def build(args: argparse.Namespace, out: Path) -> None:
    """Build the corpus: audio/, one manifest per split, plan.json.

    Its folder is `out`, or without `--name` the one beside it that `default_name` says.
    Training sentences near-equal to one of the other splits or of `--exclude` are left out of the
    manifest. Raises UsageError for an engine that is not installed, too few sentences, a pattern
    that matches no voice, or a folder that holds another plan.
    """
    out = out if args.name else out.with_name(default_name(args.text))
    splits = plan(args)
    for name in sorted({clip.engine for clips in splits.values() for clip in clips}):
        engine(name).check()
    _claim(out, args, splits)
    parts = [
        Part(out, split, number, tuple(clips[start : start + CLIPS_IN_PART]))
        for split, clips in splits.items()
        for number, start in enumerate(range(0, len(clips), CLIPS_IN_PART))
    ]
    missing = [part for part in parts if not part.manifest.is_file()]
    # A fresh process for each part: espeak's flutter and flite's noise go on from clip to clip, so
    # a part comes out the same, bit for bit, only if nothing was spoken before it.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1)
    with Progress() as progress, pool:
        total = sum(map(len, splits.values()))
        bar = progress.add_task(f"speaking into {out.name}", total=total)
        progress.advance(bar, total - sum(len(part.clips) for part in missing))
        for future in as_completed([pool.submit(render, part) for part in missing]):
            progress.advance(bar, future.result())
    spoken = {
        split: [u for part in parts if part.split == split for u in read_manifest(part.manifest)]
        for split in splits
    }
    unseen = [u for split, found in spoken.items() if split != "train" for u in found]
    for name in args.exclude:
        unseen += read_manifest(find_manifest(name))
    spoken["train"], leaks = without_leaks(spoken["train"], unseen)
    left_out = ["near-equal to a sentence of a test"] * len(leaks)
    unclear = sum(map(len, splits.values())) - sum(map(len, spoken.values())) - len(leaks)
    finish(out, spoken, left_out + ["spoken as other words than written"] * unclear)


def default_name(text: str) -> str:
    """The corpus folder of a text source.

    >>> default_name("words"), default_name("manifest:queen/train"), default_name("my/lines.txt")
    ('synth-words', 'synth-queen', 'synth-lines')
    >>> default_name("shuffled:queen/train")
    'synth-shuffled-queen'
    """
    kind, colon, name = text.rpartition(":")
    source = Path(name)
    shuffled = "shuffled-" if kind == "shuffled" else ""
    return f"synth-{shuffled}{source.parent.name if colon else source.stem}"


def render(part: Part) -> int:
    """Speak a part, write its audio, then its manifest; the number of clips tried.

    A clip in which the engine speaks other words than its text is left out.
    """
    utterances: dict[int, Utterance] = {}
    (part.folder / "audio" / part.split).mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(part.clips)), key=lambda index: part.clips[index].engine)
    for name, group in groupby(order, key=lambda index: part.clips[index].engine):
        indices = list(group)
        clips = [part.clips[index] for index in indices]
        for index, clip, spoken in zip(indices, clips, engine(name).speak(clips), strict=True):
            timed = spans(clip.text, spoken.segments)
            if timed is None:
                continue
            serial = part.number * CLIPS_IN_PART + index
            path = part.folder / "audio" / part.split / f"{serial:05d}.flac"
            wave = _wave(spoken.samples, spoken.rate, clip)
            soundfile.write(path, wave, SAMPLE_RATE)
            phones, words = (_later(found, clip.lead) for found in timed)
            utterances[index] = Utterance(
                id=path.name,
                audio=path,
                text=clip.text,
                duration=len(wave) / SAMPLE_RATE,
                speaker=f"{clip.engine}:{clip.voice}",
                source=f"synth:{clip.engine}",
                phones=phones,
                words=words,
                times=EXACT,
            )
    write_manifest(part.manifest, [utterances[index] for index in sorted(utterances)])
    return len(part.clips)


def _wave(samples: np.ndarray, rate: int, clip: Clip) -> np.ndarray:
    wave = soxr.resample(samples, rate, SAMPLE_RATE)
    silence = (round(clip.lead * SAMPLE_RATE), round(clip.tail * SAMPLE_RATE))
    return np.pad(wave, silence)


def _later(found: Sequence[Span], seconds: float) -> tuple[Span, ...]:
    return tuple(
        Span(label, round(start + seconds, 4), round(end + seconds, 4))
        for label, start, end in found
    )


def _claim(out: Path, args: argparse.Namespace, splits: Mapping[str, list[Clip]]) -> None:
    """Write the plan down, or make sure that the folder was begun with the same one."""
    clips = [[split, *astuple(clip)] for split, clips in splits.items() for clip in clips]
    digest = hashlib.sha256(json.dumps(clips).encode()).hexdigest()
    path = out / "plan.json"
    if path.is_file() and json.loads(path.read_text())["sha256"] != digest:
        raise UsageError(f"{out}: was begun with other arguments; remove it or give another --name")
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    path.write_text(json.dumps({"sha256": digest, **settings}, indent=2) + "\n")
