"""Praat's TextGrids, long or short text, as UTF-8 or UTF-16.

Praat itself reads nothing of such a file but free-standing numbers, "texts" and <flags>, in order:
`xmin =`, `intervals [1]:` and whatever else stands between them, or behind a `!`, is comment. Read
like this, both formats and any layout are one. praatio, which Montreal Forced Aligner writes with,
counts lines and searches for those comments instead, also inside labels.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from melprobe.corpus.manifest import Span
from melprobe.errors import UsageError

_TOKEN = re.compile(
    r'(?<!\S)(?:"(?P<text>(?:[^"]|"")*)"|(?P<flag><\w+>)'
    r"|(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?))(?!\S)"
    r"|(?<!\S)!.*"
)


class Tier(NamedTuple):
    """The labelled intervals of a tier, also those whose label is empty."""

    name: str
    spans: tuple[Span, ...]


def read_textgrid(path: Path) -> list[Tier]:
    """The interval tiers of a TextGrid, in its order; point tiers are left out.

    Raises UsageError that names the file: not readable, not a TextGrid in text, cut short.
    """
    try:
        return list(_tiers(_tokens(_text(path))))
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror})") from None
    except _Other as error:
        raise UsageError(f"{path}: not a TextGrid, or a damaged one ({error})") from None


class _Other(Exception):
    """What is wrong with a file."""


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(b"ooBinaryFile"):
        raise _Other("it is binary: save it as a text file in Praat")
    try:
        if data.startswith((codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Other("neither UTF-8 nor UTF-16: save it as one of them in Praat") from None


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, value) of everything that is not comment."""
    for found in _TOKEN.finditer(text):
        if found.lastgroup is not None:
            yield found.lastgroup, found[found.lastgroup]


def _tiers(tokens: Iterator[tuple[str, str]]) -> Iterator[Tier]:
    def take(kind: str) -> str:
        there, value = next(tokens, ("end", ""))
        if there != kind:
            what = "it ends too early" if there == "end" else f"{value!r} stands for a {kind}"
            raise _Other(what)
        return value.replace('""', '"') if kind == "text" else value

    # Old Praats wrote `ooTextFile short` into short ones.
    if not take("text").startswith("ooTextFile"):
        raise _Other("it does not begin with ooTextFile")
    if (what := take("text")) != "TextGrid":
        raise _Other(f"it holds a {what}")
    for kind in ("number", "number", "flag"):
        take(kind)
    for _ in range(_count(take("number"))):
        kind, name = take("text"), take("text")
        for bound in ("number", "number"):
            take(bound)
        count = _count(take("number"))
        if kind == "IntervalTier":
            rows = [[take(x) for x in ("number", "number", "text")] for _ in range(count)]
            yield Tier(name, tuple(Span(text, float(a), float(b)) for a, b, text in rows))
        elif kind == "TextTier":
            for point in ("number", "text") * count:
                take(point)
        else:
            raise _Other(f"a tier is a {kind!r}")


def _count(number: str) -> int:
    if not number.isdecimal():
        raise _Other(f"{number} can't be a count")
    return int(number)
