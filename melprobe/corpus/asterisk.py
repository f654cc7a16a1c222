"""The telephone prompts of the Asterisk exchange: one speaker, studio recordings, exact texts.

Reads the Debian packages asterisk-core-sounds-en-g722 (audio) and asterisk-core-sounds-en
(transcripts), both CC-BY-SA-3.0, and decodes G.722 with PyAV. Splits by clusters of near-equal
text. What it cannot know: whether a prompt was re-recorded after its transcript was written.
"""

import argparse
import gzip
import hashlib
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from melprobe.corpus.clips import clip_seconds, finish
from melprobe.corpus.leakage import clusters
from melprobe.corpus.manifest import Utterance, write_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SHARES = {"test": 0.22, "dev": 0.08, "train": 0.70}
VERY_LONG_SECONDS = 20.0
BUILTIN = {"test": (40, 3), "train": (60, 2)}
"""Clips of the built-in set, and the fewest words of each."""
BUILTIN_SECONDS = (0.8, 4.2)

_STAGE_NOTE = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)")
_SAID = {"*": "star", "#": "pound"}
_MISSPELT = {
    "umute": "unmute",
    "represenatives": "representatives",
    "witheld": "withheld",
    "Un-indentified": "Unidentified",
    "exclaimation-point": "exclamation point",
    "fourtieth": "fortieth",
}
_ATTRIBUTION = """\
# Built-in recordings

The clips in `audio/` are telephone prompts of the Asterisk project, taken from the Debian packages
asterisk-core-sounds-en-g722 and asterisk-core-sounds-en 1.6.1.

- Voice: Allison Smith (http://www.theivrvoice.com). Copyright 2003-2010, Allison Smith.
- Financial contributions by Digium, Inc. (http://www.digium.com).
- Source: http://downloads.asterisk.org/pub/telephony/asterisk/
- Licence: Creative Commons Attribution-ShareAlike 3.0 Unported,
  https://creativecommons.org/licenses/by-sa/3.0/

Changes: a choice of {count} of the prompts, decoded from G.722 to 16 kHz FLAC; transcripts without
stage notes and with spelling mistakes mended. These clips and `train.jsonl` and `test.jsonl` are
under the same licence, CC-BY-SA-3.0; the rest of melprobe is not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build asterisk`."""
    parser.add_argument(
        "--sounds", type=Path, default=SOUNDS, help="folder of .g722 files (default %(default)s)"
    )
    parser.add_argument(
        "--transcripts", type=Path, default=TRANSCRIPTS, help="gzipped (default %(default)s)"
    )
    parser.add_argument(
        "--export-builtin", type=Path, metavar="DIR", help="also write the built-in set to DIR"
    )


def build(args: argparse.Namespace, out: Path) -> None:
    """Decode, clean and split the prompts into `out`. Raises UsageError if a package is missing."""
    for path, package in (
        (args.sounds, "asterisk-core-sounds-en-g722"),
        (args.transcripts, "asterisk-core-sounds-en"),
    ):
        if not path.exists():
            raise UsageError(f"{path}: not there; install it with `apt install {package}`")
    transcripts = parse_transcripts(gzip.decompress(args.transcripts.read_bytes()).decode())
    utterances: list[Utterance] = []
    left_out: list[str] = []
    for name, text in track(transcripts.items(), "decoding prompts"):
        source = args.sounds / f"{name}.g722"
        if not text or not source.is_file():
            left_out.append("without words" if not text else "not among the sounds")
            continue
        path = out / "audio" / f"{name.replace('/', '-')}.flac"
        seconds = clip_seconds(path, partial(read_g722, source))
        utterances.append(
            Utterance(path.name, path, text, seconds, "Allison Smith", source="asterisk")
        )
    splits = split(utterances)
    finish(out, splits, left_out)
    if args.export_builtin:
        export_builtin(splits, args.export_builtin)


def parse_transcripts(listing: str) -> dict[str, str]:
    """`name: text` lines to {name: text said}; the text is empty where nothing is said."""
    lines = [line for line in listing.splitlines() if ": " in line and not line.startswith(";")]
    return {name: _said(text) for name, text in (line.split(": ", 1) for line in lines)}


def _said(text: str) -> str:
    text = _STAGE_NOTE.sub(" ", text)
    for written, said in _SAID.items():
        text = text.replace(written, said)
    for wrong, right in _MISSPELT.items():
        text = text.replace(wrong, right)
    return " ".join(text.split()).strip(". ") if "..." in text else " ".join(text.split())


def read_g722(path: Path) -> np.ndarray:
    """A raw G.722 file as float32 [N] at 16 kHz."""
    try:
        import av
    except ImportError:
        raise UsageError(
            "G.722 is decoded by PyAV: install it with `pip install 'melprobe[corpora]'`"
        ) from None
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 2**15


def split(utterances: list[Utterance]) -> dict[str, list[Utterance]]:
    """Whole clusters of near-equal text to splits, by `SHARES` of short prompts and of others.

    An order by hash decides, so that it is the same everywhere and for ever. Clusters with a very
    long prompt go to train: one of them would be a quarter of the test's words.
    """
    members: dict[int, list[Utterance]] = {}
    for utterance, number in zip(utterances, clusters([u.text for u in utterances]), strict=True):
        members.setdefault(number, []).append(utterance)
    splits: dict[str, list[Utterance]] = {"train": [], "dev": [], "test": []}
    for long in (True, False):
        group = [c for c in members.values() if (len(c[0].text.split()) >= 3) == long]
        group.sort(key=lambda cluster: min(_hash(u.id) for u in cluster))
        group.sort(key=lambda cluster: max(u.duration for u in cluster) > VERY_LONG_SECONDS)
        ends = np.cumsum(list(SHARES.values())) * sum(map(len, group))
        done = 0
        for cluster in group:
            name = list(SHARES)[int(np.searchsorted(ends, done, side="right"))]
            splits[name] += cluster
            done += len(cluster)
    return {name: sorted(chosen, key=lambda u: u.id) for name, chosen in splits.items()}


def export_builtin(splits: dict[str, list[Utterance]], folder: Path) -> None:
    """Copy a choice of each split that fits in the package, with its attribution."""
    for name, (count, words) in BUILTIN.items():
        exported = []
        for utterance in _varied(splits[name], words)[:count]:
            path = folder / "audio" / utterance.audio.name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(utterance.audio, path)
            exported.append(replace(utterance, audio=path.absolute()))
        write_manifest(folder / f"{name}.jsonl", sorted(exported, key=lambda u: u.id))
    total = sum(count for count, _ in BUILTIN.values())
    (folder / "ATTRIBUTION.md").write_text(_ATTRIBUTION.format(count=total))


def _varied(utterances: list[Utterance], words: int) -> list[Utterance]:
    """Clips of different text and fit length: one of each cluster, then a second of each, ..."""
    shortest, longest = BUILTIN_SECONDS
    fit = {
        plain_text(u.text): u
        for u in sorted(utterances, key=lambda u: _hash(u.text))
        if shortest <= u.duration <= longest and len(u.text.split()) >= words
    }
    turn: Counter[int] = Counter()
    turns = []
    for cluster in clusters(list(fit)):
        turns.append(turn[cluster])
        turn[cluster] += 1
    # Sorting is stable: within a turn, the order by hash stays.
    return [u for _, u in sorted(zip(turns, fit.values(), strict=True), key=lambda pair: pair[0])]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
