"""The data file of Flight of the Amazon Queen: its container, its lines, and who says them.

All integers are big-endian. `queen.1c` holds a table of named files. Of these, `.SB` are MP3 clips
of eight-letter names, and the names are built from the place of the line in a text file:

- dialogue, `.DOG`: two digits of the dialogue's number, four hexadecimal ones of the line's key (or
  SSSS and XXXX for the lines that open a first and a second talk), J for the player or P for the
  other person, and the segment;
- cutscene, `.CUT`: the file's name padded to five with `_`, two digits of the line, the segment;
- `QUEEN2.JAS`, what the player says of things he looks at: JOE, four digits, the segment.

A line is cut into its segments by `*` with two letters or digits, codes for pictures and gestures.
Found by looking at the file; what the bytes between the texts mean is known only as far as needed.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from melprobe.errors import UsageError

PLAYER = "Joe King"
COMIC = "comic strip"
"""Who reads the strip out: the cutscene's lines belong to no figure in the scene."""
_SEGMENT = re.compile(r"\*XY\d\d\(\d+,\d+\)|\*\w\w")
_FIRST_DESCRIPTION = 41
_COMIC_OBJECT = -3
_LIST_END = -2


class Line(NamedTuple):
    """What one clip says."""

    clip: str
    """Name of the `.SB` entry, without ending."""
    text: str
    speaker: str
    """As the game names the person: `Joe King`, a `.DOG` file's stem, an object's name, or none."""
    scene: str
    """The file with the text."""


class Bank:
    """The named files in `queen.1c`."""

    def __init__(self, path: Path):
        self._data = path.read_bytes()
        if self._data[:4] != b"QTBL":
            raise UsageError(
                f"{path}: not a queen.1c with a table of contents (no QTBL at its start)"
            )
        count = struct.unpack_from(">H", self._data, 13)[0]
        entries = struct.iter_unpack(">12sxII", self._data[15 : 15 + 21 * count])
        self._places = {
            name.split(b"\0")[0].decode("ascii"): (start, size) for name, start, size in entries
        }
        if max(start + size for start, size in self._places.values()) > len(self._data):
            raise UsageError(f"{path}: cut short; install flight-of-the-amazon-queen again")

    def names(self, ending: str) -> list[str]:
        """The names that end so, in the file's order."""
        return [name for name in self._places if name.endswith(ending)]

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        start, size = self._places[name]
        return self._data[start : start + size]


def spoken_lines(bank: Bank) -> Iterator[Line]:
    """Every segment of every text, whether or not a clip of that name exists."""
    descriptions, object_names = _things(bank)
    for number, text in enumerate(descriptions, _FIRST_DESCRIPTION):
        yield from _segments(f"JOE{number:04d}", text, PLAYER, "QUEEN2.JAS")
    for name in bank.names(".DOG"):
        for stem, text in dialogue(bank.read(name)):
            speaker = PLAYER if stem[-1] == "J" else name.removesuffix(".DOG").rstrip("0123456789")
            yield from _segments(stem, text, speaker, name)
    for name in bank.names(".CUT"):
        for number, (thing, text) in enumerate(cutscene(bank.read(name)), 1):
            speaker = {0: PLAYER, _COMIC_OBJECT: COMIC}.get(thing, "")
            if thing > 0:
                speaker = object_names[thing - 1]
            stem = f"{name.removesuffix('.CUT').ljust(5, '_')}{number:02d}"
            yield from _segments(stem, text, speaker, name)


def dialogue(data: bytes) -> Iterator[tuple[str, str]]:
    """(clip name without segment, line) of a `.DOG` file."""
    levels, _, number, player_lines, other_lines = struct.unpack_from(">5h", data, 20)
    _, ending = struct.unpack_from(">2H", data, 44)
    at = 20 + 32 + 96 * abs(levels)
    for who, count in (("J", player_lines), ("P", other_lines)):
        for _ in range(count):
            key, size = struct.unpack_from(">IB", data, at)
            text = data[at + 5 : at + 5 + size].decode("latin-1")
            yield f"{number:02d}{f'{key:04X}' if key else 'SSSS'}{who}", text
            at = _aligned(at + 5 + size, 4)
    at = 20 + ending
    for who in "PJ":
        yield f"{number:02d}XXXX{who}", _short_text(data, at)
        at = _aligned(at + 1 + data[at], 2)


def cutscene(data: bytes) -> Iterator[tuple[int, str]]:
    """(number of the object that speaks, line) of a `.CUT` file; 0 is the player."""
    count, texts = struct.unpack_from(">2xh4xH", data, 20)
    moves, said = 32, 20 + texts
    said += 1 + data[said]
    for _ in range(abs(count)):
        words = struct.unpack_from(">18h", data, moves)
        moves += 36 + 2 * words[17]
        if words[5]:
            while struct.unpack_from(">h", data, moves)[0] != _LIST_END:
                moves += 20
            moves += 2
        yield words[0], _short_text(data, said)
        said = _aligned(said + 1 + data[said], 2)


def _things(bank: Bank) -> tuple[list[str], list[str]]:
    """What the player says of things, and the name of each of the game's objects."""
    data = bank.read("QUEEN.JAS")
    _, _, objects, described = struct.unpack_from(">4H", data, 20)
    lines = bank.read("QUEEN2.JAS").decode("latin-1").split("\r\n")
    numbers = (abs(struct.unpack_from(">h", data, 28 + 16 * i)[0]) for i in range(objects))
    return lines[:described], [lines[described + n - 1] if n else "" for n in numbers]


def _segments(stem: str, text: str, speaker: str, scene: str) -> Iterator[Line]:
    for number, piece in enumerate(_SEGMENT.split(text), 1):
        yield Line(f"{stem}{number:X}", piece, speaker, scene)


def _short_text(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode("latin-1")


def _aligned(at: int, step: int) -> int:
    return at + -at % step
