"""The one manifest that every corpus ends in: JSON lines, one utterance a line.

Fields: `audio` (path relative to the manifest), `text`, `duration` (seconds), and optionally
`speaker`, `sex` (female or male), `source`, `phones` and `words` (lists of [label, start, end],
seconds), `times` (where these come from) and `no_times` (why an aligner left the clip without).
Where recordings lie inside larger files, such as tar shards, `audio` is the shard,
`bytes` ([offset, size]) says where in it, and `id` may name the recording. Other fields are left
unread. A corpus is a folder with one manifest per split: `train.jsonl`, `dev.jsonl`, `test.jsonl`.
Reading a manifest does not open its audio: `melprobe.audio.load` does.

Shards are not streamed one after the other, as lhotse's and webdataset's own readers do. A reader
that has been killed would have to read again from the start, the order of batches would depend on
the number of processes, and the leak check needs every text beforehand anyway. With the place of
each recording in a manifest, which is small, a process reads the bytes of its own clips alone,
nothing is unpacked, and whatever works on files works on shards.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from melprobe.cache import cache_dir
from melprobe.errors import UsageError

BUILTIN = Path(__file__).parent / "builtin"
EXACT, ALIGNED, TEXTGRID = "exact", "forced alignment", "TextGrid"
TIMES = (EXACT, ALIGNED, TEXTGRID)
"""Where word and phone times come from: a synthesiser, `corpus align`, `corpus textgrid`."""
FIELDS = {"audio", "bytes", "text", "duration", "speaker", "sex", "source", "phones", "words"}
FIELDS |= {"times", "no_times"}
BUILDABLE = ("asterisk", "queen", "synth", "jsonl", "hub", "shards")


class Span(NamedTuple):
    """A phone or a word and when it sounds, in seconds from the start of the clip."""

    label: str
    start: float
    end: float


class Bytes(NamedTuple):
    """Where a recording lies inside a larger file."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Utterance:
    """One clip and what is said in it."""

    id: str
    """The manifest's relative audio path, with forward slashes, or in a shard what its line says;
    unique in its manifest."""
    audio: Path
    """Absolute."""
    text: str
    duration: float
    """Seconds."""
    speaker: str = ""
    source: str = ""
    phones: tuple[Span, ...] = ()
    words: tuple[Span, ...] = ()
    where: str = ""
    """`manifest.jsonl:12`, for error messages."""
    bytes: Bytes | None = None
    """Those of `audio` that are the recording; None: all."""
    sex: str = ""
    """Of the speaker: female, male, or "" where it is not said."""
    times: str = ""
    """One of `TIMES`, or "" where it is not said or there are no times."""
    no_times: str = ""
    """Why an aligner, or an import, left the clip without times."""

    @property
    def corpus(self) -> str:
        """`source` without what a corpus says there of a clip: its scene, its engine.

        >>> Utterance("", Path(), "hi", 1.0, source="queen:jungle").corpus
        'queen'
        """
        kind, _, name = self.source.partition(":")
        return self.source if kind == "hub" and name else kind

    @property
    def place(self) -> str:
        """Manifest line and file, for error messages."""
        file = str(self.audio)
        if self.bytes:
            file += f", {self.bytes.size} bytes from {self.bytes.offset} on ({self.id})"
        return f"{self.where}: {file}" if self.where else file


def read_manifest(path: Path) -> list[Utterance]:
    """Every utterance of a manifest, in its order.

    Raises UsageError that names file, line and field: unreadable file, line that is not a JSON
    object, field missing or of the wrong kind, audio listed twice, no utterance at all.
    """
    utterances: list[Utterance] = []
    where_is: dict[str, str] = {}
    for where, record in read_records(path):
        utterance = parse_record(record, path.absolute().parent, where)
        first = where_is.setdefault(utterance.id, where)
        if first != where:
            field = "audio" if utterance.bytes is None else "id"
            raise UsageError(f"{where}: {field}: {utterance.id} is already at {first}")
        utterances.append(utterance)
    return utterances


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest whole or not at all; audio paths become relative to it."""
    folder = path.absolute().parent
    write_records(path, (to_record(utterance, folder) for utterance in utterances))


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON objects, one a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as out:
        for record in records:
            print(json.dumps(record, ensure_ascii=False), file=out)
    draft.replace(path)


def find_manifest(name: str) -> Path:
    """The manifest that `name` means: an existing path, or CORPUS/SPLIT.

    `builtin/test` is in the package, the others where `melprobe.corpus build` puts them. Raises
    UsageError that lists what there is.
    """
    if Path(name).is_file():
        return Path(name)
    corpus, _, split = name.partition("/")
    if corpus == "builtin" and split and (BUILTIN / f"{split}.jsonl").is_file():
        return BUILTIN / f"{split}.jsonl"
    corpora = cache_dir("corpora")
    path = corpora / corpus / f"{split}.jsonl"
    if corpus and split and "/" not in split and path.is_file():
        return path
    there = [f"builtin/{path.stem}" for path in sorted(BUILTIN.glob("*.jsonl"))]
    there += [f"{path.parent.name}/{path.stem}" for path in sorted(corpora.glob("*/*.jsonl"))]
    kind = corpus.partition("-")[0]
    command = f"python -m melprobe.corpus build {kind if kind in BUILDABLE else 'NAME'}"
    nearest = ", ".join(get_close_matches(name, there, cutoff=0))
    raise UsageError(
        f"{name}: neither a manifest file nor a corpus; the nearest are {nearest};"
        f" `{command}` builds more (see --help)"
    )


def check_name(option: str, name: str, taken: Iterable[str] = ()) -> str:
    """A corpus or split name that can be a file's, or UsageError."""
    if not re.fullmatch(r"(?!\.)[\w.-]+", name):
        raise UsageError(f"{option} {name!r}: take letters, digits, and . - _ after the first")
    if name in taken:
        raise UsageError(f"{option} {name}: this is a corpus of melprobe's own; take another name")
    return name


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(`file:line`, JSON object) of each line. Raises UsageError as `read_manifest` does."""
    try:
        # Not splitlines(): JSON strings may hold U+2028 and other separators.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such manifest") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        reason = f"not UTF-8 ({error.reason}); save it as UTF-8"
        raise UsageError(f"{path}:{number}: {reason}") from None
    except OSError as error:
        raise UsageError(f"{path}: not a readable manifest ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UsageError(f"{path}:{number}: not a JSON object but {type(record).__name__}")
        records.append((f"{path}:{number}", record))
    if not records:
        raise UsageError(f"{path}: the manifest is empty")
    return records


def parse_record(record: dict[str, Any], folder: Path, where: str) -> Utterance:
    """One line's utterance; `folder` is the manifest's. Raises UsageError that names the field."""
    for name in record.keys() - FIELDS:
        if (meant := name.strip().lower()) in FIELDS:
            raise UsageError(f"{where}: {name}: there is no such field; did you mean {meant}?")
    audio = Path(_string(record, "audio", where))
    if "duration" not in record:
        raise UsageError(f"{where}: duration: is missing (`corpus build jsonl` measures it)")
    duration = record["duration"]
    if not _is_seconds(duration) or duration == 0:
        raise UsageError(f"{where}: duration: must be seconds above 0, not {duration!r}")
    within = _bytes(record, where)
    name = audio.as_posix()
    if within is not None:
        # Only here: in other manifests an id is one of the fields that are left unread.
        named = record.get("id") is not None
        name = _string(record, "id", where) if named else f"{name}/{within.offset}"
    return Utterance(
        id=name,
        audio=folder / audio,
        text=_string(record, "text", where),
        duration=float(duration),
        speaker=_string(record, "speaker", where, default=""),
        source=_string(record, "source", where, default=""),
        phones=_spans(record, "phones", where),
        words=_spans(record, "words", where),
        where=where,
        bytes=within,
        sex=_sex(record, where),
        times=_times(record, where),
        no_times=_string(record, "no_times", where, default=""),
    )


def _times(record: dict[str, Any], where: str) -> str:
    times = _string(record, "times", where, default="")
    if times not in ("", *TIMES):
        known = ", ".join(TIMES)
        raise UsageError(f"{where}: times: must be one of {known}, or left out, not {times!r}")
    return times


def _sex(record: dict[str, Any], where: str) -> str:
    sex = _string(record, "sex", where, default="")
    if sex not in ("", "female", "male"):
        raise UsageError(f"{where}: sex: must be female or male, or left out, not {sex!r}")
    return sex


def _bytes(record: dict[str, Any], where: str) -> Bytes | None:
    match record.get("bytes"):
        case None:
            return None
        case [int(offset), int(size)] if offset >= 0 and size > 0:
            return Bytes(offset, size)
    raise UsageError(f"{where}: bytes: must be [offset, size], not {record['bytes']!r}")


def _string(record: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = record.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or not (value.strip() or default is not None):
        problem = f"must be a non-empty string, not {value!r}" if field in record else "is missing"
        raise UsageError(f"{where}: {field}: {problem}")
    return value


def _spans(record: dict[str, Any], field: str, where: str) -> tuple[Span, ...]:
    rows = [] if record.get(field) is None else record[field]
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(), start, end] if _is_seconds(start) and _is_seconds(end) and start <= end:
                continue
        raise UsageError(f"{where}: {field}: must be [label, start_s, end_s] rows, not {row!r}")
    return tuple(Span(label, float(start), float(end)) for label, start, end in rows)


def _is_seconds(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= 0


def to_record(utterance: Utterance, folder: Path) -> dict[str, Any]:
    """Its line in a manifest in `folder`."""
    record: dict[str, Any] = {
        "audio": Path(os.path.relpath(utterance.audio, folder)).as_posix(),
        "bytes": utterance.bytes,
        "id": utterance.id if utterance.bytes else None,
        "text": utterance.text,
        "duration": round(utterance.duration, 4),
        "speaker": utterance.speaker,
        "sex": utterance.sex,
        "source": utterance.source,
        "phones": [[span.label, span.start, span.end] for span in utterance.phones],
        "words": [[span.label, span.start, span.end] for span in utterance.words],
        "times": utterance.times,
        "no_times": utterance.no_times,
    }
    return {field: value for field, value in record.items() if value}
