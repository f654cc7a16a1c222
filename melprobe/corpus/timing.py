"""Giving the clips of manifests word and phone times, wherever these come from.

A clip's line gets `words`, `phones` and `times`, which says where they come from, or `no_times`,
the reason why it has none. Other fields stay as they are, also those that melprobe doesn't read.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from melprobe.corpus.manifest import (
    Span,
    Utterance,
    find_manifest,
    parse_record,
    read_manifest,
    read_records,
    write_records,
)
from melprobe.errors import UsageError, check_writable


class Times(NamedTuple):
    """When the words and the phones of a clip are said."""

    words: tuple[Span, ...]
    phones: tuple[Span, ...]


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option of commands that give times."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="MANIFEST",
        help="a new manifest of all clips; without it, those that were given are changed",
    )


class Sheet:
    """A manifest whose clips are given times."""

    def __init__(self, name: str):
        """name: CORPUS/SPLIT or a file. UsageError where it can't be read."""
        self.name, self.path = name, find_manifest(name)
        self.utterances: list[Utterance] = read_manifest(self.path)
        self.records: list[dict[str, Any]] = [record for _, record in read_records(self.path)]
        self.left_out = Counter[str]()

    def give(self, number: int, times: Times, origin: str) -> None:
        """Times of clip `number`; those that it had are replaced."""
        self.records[number].pop("no_times", None)
        self.records[number] |= {"phones": times.phones, "words": times.words, "times": origin}

    def leave(self, number: int, reason: str) -> None:
        """Clip `number` gets none. What it has it keeps."""
        self.left_out[reason] += 1
        u = self.utterances[number]
        if not u.words and not u.phones:
            self.records[number]["no_times"] = reason

    def tell(self, done: str) -> None:
        """Print how many clips are `done`, and how many were left out, with the reasons."""
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.most_common()]
        n = len(self.records)
        have = f"{n - self.left_out.total():,} of {n:,} {done}"
        print(f"{self.name}: {have}" + ("; " + ", ".join(reasons) if reasons else ""))


def open_sheets(names: Sequence[str], out: Path | None) -> list[Sheet]:
    """The manifests. UsageError where one can't be read, or nothing be written where it is to go.

    With `out` all become one, in which no recording may be twice.
    """
    sheets = [Sheet(name) for name in dict.fromkeys(names)]
    if out is None:
        for sheet in sheets:
            check_writable(sheet.path.absolute().parent, sheet.name)
        return sheets
    if out.is_dir():
        raise UsageError(f"--out {out}: this is a folder; name a manifest in it")
    check_writable(out.absolute().parent, f"--out {out}")
    where_is: dict[str, str] = {}
    for sheet in sheets:
        for u, record in zip(sheet.utterances, _moved(sheet, out), strict=True):
            name = parse_record(record, out.absolute().parent, u.where).id
            if (first := where_is.setdefault(name, u.where)) != u.where:
                raise UsageError(f"{u.where}: {name} is already at {first}; give each clip once")
    return sheets


def write_sheet(sheet: Sheet) -> None:
    """Put the manifest with its times in its own place."""
    write_records(sheet.path, sheet.records)


def write_joined(sheets: Iterable[Sheet], out: Path) -> None:
    """One manifest of all their clips; audio paths become relative to it."""
    write_records(out, (record for sheet in sheets for record in _moved(sheet, out)))


def _moved(sheet: Sheet, out: Path) -> list[dict[str, Any]]:
    folder = out.absolute().parent
    return [
        record | {"audio": Path(os.path.relpath(u.audio, folder)).as_posix()}
        for u, record in zip(sheet.utterances, sheet.records, strict=True)
    ]
