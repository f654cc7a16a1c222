"""Who says what, how fast and how high: it follows from the arguments and the seed alone.

Splits: `train` has the training voices; `dev` the same voices with unseen sentences; `test` voices
held out of training; `test-engine` an engine held out whole.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from typing import cast

from melprobe.corpus.engines import Clip, Engine
from melprobe.corpus.sentences import draw
from melprobe.errors import UsageError

ENGINES = ("espeak", "flite", "festival")
HELD_OUT = (
    "flite:rms",
    "espeak:en-gb-scotland+*",
    *(
        f"espeak:*+{variant}"
        for variant in ["Alicia", "Lee", "aunty", "boris", "linda", "travis", "victor", "zac"]
    ),
)
SPEED = (0.75, 1.25)
PITCH = (20, 80)
SILENCE = 0.3
"""Seconds of silence before and after a clip, at most; espeak has none of its own."""


def plan(args: argparse.Namespace) -> dict[str, list[Clip]]:
    """Who says what in each split; the same arguments give the same plan."""
    if min(args.n, args.jobs) < 1 or min(args.dev, args.test, args.test_engine) < 0:
        raise UsageError("--n and --jobs must be at least 1, the other sizes at least 0")
    shares = _shares(args.engines, args.hold_out_engine)
    speakers = [f"{name}:{voice}" for name in shares for voice in engine(name).VOICES]
    held_out = [_matching(pattern, speakers) for pattern in args.hold_out_voices]
    unheard = {speaker for group in held_out for speaker in group}
    known = [[speaker] for speaker in speakers if speaker not in unheard]
    foreign = [[f"{args.hold_out_engine}:{v}"] for v in engine(args.hold_out_engine).VOICES]
    # One held-out pattern has as many clips as another, however many voices it matches.
    casts = {"dev": known, "test": held_out, "test-engine": foreign, "train": known}
    sizes = {"dev": args.dev, "test": args.test, "test-engine": args.test_engine, "train": args.n}
    sizes = {split: size for split, size in sizes.items() if size}
    rng = random.Random(f"voices {args.seed}")
    sentences = draw(args.text, sizes, args.seed)
    return {split: _cast(rng, split, sentences[split], casts[split], shares) for split in sizes}


def engine(name: str) -> Engine:
    """The engine's module."""
    return cast(Engine, import_module(f"melprobe.corpus.engines.{name}"))


def _cast(
    rng: random.Random,
    split: str,
    sentences: Sequence[str],
    groups: Sequence[Sequence[str]],
    shares: Mapping[str, float],
) -> list[Clip]:
    """A speaker for each sentence: first the engine by its share, then a group, then one of it."""
    of_engine = {
        name: [group for group in groups if group[0].startswith(f"{name}:")] for name in ENGINES
    }
    names = [name for name in ENGINES if of_engine[name]]
    if not names:
        raise UsageError(f"no voice is left for {split}: mend --hold-out-voices or --engines")
    clips = []
    for text in sentences:
        name = rng.choices(names, [shares.get(name, 1.0) for name in names])[0]
        speaker = rng.choice(rng.choice(of_engine[name]))
        clips.append(
            Clip(
                text=text,
                engine=name,
                voice=speaker.partition(":")[2],
                speed=round(rng.uniform(*SPEED), 3),
                pitch=rng.randint(*PITCH),
                lead=round(rng.uniform(0, SILENCE), 4),
                tail=round(rng.uniform(0, SILENCE), 4),
            )
        )
    return clips


def _shares(text: str, held_out: str) -> dict[str, float]:
    """Parse `espeak=7,flite=3`; the held-out engine has no share."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        if name not in ENGINES or not (share or "1").isdecimal() or share == "0":
            raise UsageError(
                f"--engines {text}: {item} is not ENGINE=SHARE; engines: {', '.join(ENGINES)}"
            )
        shares[name] = float(share or 1)
    shares.pop(held_out, None)
    if not shares:
        raise UsageError(f"--engines {text}: nothing is left without {held_out}")
    return shares


def _matching(pattern: str, speakers: Sequence[str]) -> list[str]:
    found = [speaker for speaker in speakers if fnmatchcase(speaker, pattern)]
    if not found:
        raise UsageError(
            f"--hold-out-voices {pattern}: matches none of {len(speakers)} voices, such as"
            f" {speakers[0]}"
        )
    return found
