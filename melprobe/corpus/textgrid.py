"""`python -m melprobe.corpus textgrid NAME FOLDER`: word and phone times from Praat TextGrids.

FOLDER is the output of the Montreal Forced Aligner, or TextGrids of any other hand, in folders as
deep as they like. A clip's is named as its recording: of `a/b.flac` it is b.TextGrid, and where
there are several of that name the one in a folder a. Its interval tiers `words` and `phones` are
taken, or those of the clip's speaker (`Ann - words`); `word` and `phone` will do. Words have to be
the clip's text, whatever its punctuation. Phones become ARPAbet, lower-case, without stress; what
is empty, sil, sp or <eps> is silence, and a clip with a phone that isn't known, such as MFA's spn,
gets the times of its words alone. Times that a clip has already are replaced.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

from melprobe.audio.load import OFF_BY_SECONDS
from melprobe.corpus.manifest import TEXTGRID, Span, Utterance
from melprobe.corpus.phones import fold
from melprobe.corpus.praat import Tier, read_textgrid
from melprobe.corpus.text import plain_text
from melprobe.corpus.timing import Times, add_out, open_sheets, write_joined, write_sheet
from melprobe.errors import UsageError

SILENT = {"", "sil", "sp", "<eps>"}
NO_FILE, NO_CHOICE = "without a TextGrid", "with TextGrids that may be others'"
BAD, OTHER_WORDS = "with unusable TextGrids", "with other words than their text"
NO_PHONES = "with words alone"


class Unusable(UsageError):
    """A TextGrid that gives a clip no times: the message says why, `reason` is its kind."""

    def __init__(self, message: str, reason: str = BAD):
        super().__init__(message)
        self.reason = reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `textgrid`."""
    parser.add_argument("manifest", metavar="NAME", help="such as queen/train, or a manifest file")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of TextGrids")
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """Take times from the TextGrids; a line for each clip that gets none, and one about all.

    Raises UsageError where the manifest or the folder can't be used, or no file fits any clip.
    """
    (sheet,) = open_sheets([args.manifest], args.out)
    files = find_textgrids(args.folder)
    given = Counter[str]()
    for number, (u, chosen) in enumerate(
        zip(sheet.utterances, choose(files, sheet.utterances), strict=True)
    ):
        try:
            times, complaint = read_times(_only(chosen), u)
        except Unusable as error:
            sheet.leave(number, error.reason)
            complaint = str(error)
        else:
            sheet.give(number, times, TEXTGRID)
            given[NO_PHONES if complaint else ""] += 1
        if complaint:
            print(f"{u.where}: {u.id}: {complaint}", file=sys.stderr)
    if not given:
        raise UsageError(
            f"{args.folder}: none of its {len(files)} TextGrids gives a clip of {args.manifest} "
            "its times; b.TextGrid is that of a/b.flac, and has tiers of words and phones"
        )
    if args.out is None:
        write_sheet(sheet)
    else:
        write_joined([sheet], args.out)
    sheet.tell("have times of TextGrids")
    if given[NO_PHONES]:
        print(f"{given[NO_PHONES]:,} of them {NO_PHONES}")


def find_textgrids(folder: Path) -> list[Path]:
    """All of a folder and those below. UsageError where there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".textgrid")
    if not found:
        raise UsageError(f"{folder}: holds no *.TextGrid")
    return found


def choose(files: Sequence[Path], utterances: Sequence[Utterance]) -> list[list[Path]]:
    """Each utterance's files: one; none; or several, if a name, with its folders, fits more.

    A file that fits several utterances equally well is several for each of them.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_stem[file.stem].append(file)
    fits: list[dict[Path, int]] = []
    for u in utterances:
        name = PurePosixPath(u.id)  # of a recording in a shard it may be without a suffix
        name = name if name.name in by_stem else name.with_suffix("")
        there = by_stem.get(name.name, [])
        fits.append({file: _alike(file.with_suffix("").parts, name.parts) for file in there})
    closest = Counter[Path]()
    for fit in fits:
        closest |= Counter(fit)
    best = [
        [file for file, n in fit.items() if n == max(fit.values()) == closest[file]] for fit in fits
    ]
    claims = Counter(file for files in best for file in files)
    return [[file for file in files for _ in range(claims[file])] for files in best]


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names at the end of two paths are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _only(files: Sequence[Path]) -> Path:
    match files:
        case []:
            raise Unusable("there is no TextGrid of its name", NO_FILE)
        case [file]:
            return file
        case [file, other, *_] if file == other:
            raise Unusable(f"{file} may be another clip's of that name", NO_CHOICE)
    raise Unusable(f"{files[0]} or {files[1]}? Keep the one that is meant", NO_CHOICE)


def read_times(path: Path, u: Utterance) -> tuple[Times, str]:
    """A clip's times, and what is to be said of them, if anything.

    Without phones where there is no tier of them or one is not known. Raises Unusable: file or
    tiers unreadable, other words than the clip's, times outside it or out of order.
    """
    try:
        tiers = read_textgrid(path)
    except UsageError as error:
        raise Unusable(str(error)) from None
    words_tier = _tier(tiers, "word", u, path)
    if words_tier is None:
        there = ", ".join(tier.name for tier in tiers) or "none"
        raise Unusable(f"{path}: has no interval tier of words; there are {there}")
    words = [
        Span(plain_text(label), start, end)
        for label, start, end in _sounding(words_tier, u, path)
        if plain_text(label)
    ]
    said = " ".join(word.label for word in words)
    if _letters(said) != _letters(plain_text(u.text)):
        raise Unusable(f"{path}: says {said!r}, the manifest {plain_text(u.text)!r}", OTHER_WORDS)
    phones_tier = _tier(tiers, "phone", u, path)
    if phones_tier is None:
        return Times(tuple(words), ()), f"{path}: has no interval tier of phones"
    phones = list[Span]()
    for label, start, end in _sounding(phones_tier, u, path):
        try:
            parts = fold(label)
        except UsageError as error:
            return Times(tuple(words), ()), f"{path}: {error}"
        edges = [round(start + i * (end - start) / len(parts), 4) for i in range(len(parts) + 1)]
        phones += map(Span, parts, edges, edges[1:])
    return Times(tuple(words), tuple(phones)), ""


def _tier(tiers: Sequence[Tier], kind: str, u: Utterance, path: Path) -> Tier | None:
    """That of words or of phones, of which there may be one for each speaker."""
    found: dict[str, Tier] = {}
    for tier in tiers:
        speaker, _, name = tier.name.strip().rpartition(" - ")
        if name.lower() in (kind, f"{kind}s"):
            found[speaker] = tier
    if len(found) > 1 and u.speaker in found:
        return found[u.speaker]
    if len(found) > 1:
        names = ", ".join(tier.name for tier in found.values())
        raise Unusable(f"{path}: has tiers {names}, and the clip's speaker is {u.speaker!r}")
    return next(iter(found.values()), None)


def _sounding(tier: Tier, u: Utterance, path: Path) -> list[Span]:
    """The intervals in which something is said, within the clip."""
    spans = [span for span in tier.spans if span.label.strip().lower() not in SILENT]
    times = [seconds for span in spans for seconds in (span.start, span.end)]
    if any(a > b for a, b in pairwise([0.0, *times])):
        raise Unusable(f"{path}: {tier.name}: its times don't rise")
    if times and times[-1] > u.duration + OFF_BY_SECONDS:
        ends = f"{tier.name} end at {times[-1]:.2f} s, the clip at {u.duration:.2f}"
        raise Unusable(f"{path}: {ends}; it may be another's")
    # Durations are known to 0.05 s, and no label may reach behind the clip.
    return [
        Span(label.strip(), *(round(min(seconds, u.duration), 4) for seconds in (start, end)))
        for label, start, end in spans
    ]


def _letters(text: str) -> str:
    """Aligners cut `it's` and `call-forward` into words in other places than we do."""
    return text.replace(" ", "").replace("'", "")
