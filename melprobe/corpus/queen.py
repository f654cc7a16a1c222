"""The voices of the game Flight of the Amazon Queen: 13 artists, some 30 characters, 4 hours.

Reads the Debian package flight-of-the-amazon-queen; the clips stay in the cache and are never part
of melprobe (the game's own licence forbids selling them). Held out whole: the artists of `test`, so
no voice in it is in training, and the scenes of `dev` and `test-scenes`. Training lines that are
near-equal to a held-out line are dropped. The recordings end at 5.5 kHz, many with an actor's
accent or a room's echo. What it cannot know: where an actor departed from the written line.
"""

import argparse
import hashlib
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

from rich.progress import track

from melprobe.audio.load import BadAudio, decode_wave
from melprobe.corpus.clips import clip_seconds, finish
from melprobe.corpus.leakage import without_leaks
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.queen_bank import Bank, Line, spoken_lines
from melprobe.corpus.queen_cast import HELD_OUT, ROLES, words_of
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError

BANK = Path("/usr/share/scummvm/flight-of-the-amazon-queen/queen.1c")
LETTERS_A_SECOND = (4, 30)
PAUSE_SECONDS = 0.8
"""What the slowest clips may hold besides speech; a plain "No." takes 0.7 s."""
HELD_OUT_SCENES = {"test-scenes": 300, "dev": 250}
"""Splits of whole scenes, and the clips at which one is full."""
LARGEST_HELD_OUT = 60
"""Clips of a family, at most, so that several characters are among the held-out scenes."""
_FAMILY = re.compile(r"queen:(C\d+|[A-Z]+)\w*\.(?:DOG|CUT)")
"""Scenes of one family (HENRY and HENRY2, C20A and C20B) repeat each other's lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build queen`."""
    parser.add_argument(
        "--bank", type=Path, default=BANK, help="the game's data file (default %(default)s)"
    )


def build(args: argparse.Namespace, out: Path) -> None:
    """Decode every clip with a text, and split. Raises UsageError if the package is missing."""
    if not args.bank.is_file():
        raise UsageError(
            f"{args.bank}: not there; install it with `apt install flight-of-the-amazon-queen`"
        )
    bank = Bank(args.bank)
    lines, left_out = choose_lines(bank)
    utterances: list[Utterance] = []
    for line in track(lines, "decoding clips"):
        name = f"{line.clip}.SB"
        path = out / "audio" / f"{line.clip}.flac"
        try:
            seconds = clip_seconds(path, partial(decode_wave, bank.read(name), name))
        except BadAudio:
            left_out.append("not audio, or silent")
            continue
        text = words_of(line)
        slowest, fastest = LETTERS_A_SECOND
        letters = len(plain_text(text).replace(" ", ""))
        if not slowest * (seconds - PAUSE_SECONDS) <= letters <= fastest * seconds:
            left_out.append("too long or too short for their text")
            continue
        speaker = str(ROLES[line.speaker])
        utterances.append(
            Utterance(path.name, path, text, seconds, speaker, source=f"queen:{line.scene}")
        )
    splits, leaks = split(utterances)
    finish(out, splits, left_out + ["near-equal to a held-out line"] * leaks)


def choose_lines(bank: Bank) -> tuple[list[Line], list[str]]:
    """The lines to take, one per clip, and why each other clip is left out."""
    texts: dict[str, list[Line]] = defaultdict(list)
    for line in spoken_lines(bank):
        texts[line.clip].append(line)
    chosen, left_out = [], []
    for clip in (name.removesuffix(".SB") for name in bank.names(".SB")):
        match texts.get(clip, []):
            case []:
                left_out.append("sounds or lines without a text")
            case [line] if not words_of(line):
                left_out.append("noises")
            case [line] if line.speaker not in ROLES:
                left_out.append("in a voice that the game does not name")
            case [line]:
                chosen.append(line)
            case _:
                left_out.append("with two texts")
    return chosen, left_out


def split(utterances: list[Utterance]) -> tuple[dict[str, list[Utterance]], int]:
    """Splits by artist and family of scenes; how many clips leaked into train and dev, and went."""
    splits: dict[str, list[Utterance]] = {name: [] for name in ("train", "dev", "test")}
    families: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        family = _FAMILY.match(utterance.source)
        if utterance.speaker.split(" as ")[0] in HELD_OUT:
            splits["test"].append(utterance)
        elif family:
            families[family[1]].append(utterance)
        else:
            splits["train"].append(utterance)
    order = sorted(families, key=lambda family: hashlib.sha256(family.encode()).hexdigest())
    small = [family for family in order if len(families[family]) <= LARGEST_HELD_OUT]
    for name, enough in HELD_OUT_SCENES.items():
        splits[name] = []
        while small and len(splits[name]) < enough:
            splits[name] += families.pop(small.pop(0))
    splits["train"] += [u for family in families.values() for u in family]
    tests = splits["test"] + splits["test-scenes"]
    splits["dev"], from_dev = without_leaks(splits["dev"], tests)
    splits["train"], from_train = without_leaks(splits["train"], splits["dev"] + tests)
    return splits, len(from_dev) + len(from_train)
