"""`build shards`: a manifest of recordings that lie in tars, which stay where and as they are.

Reads folders of lhotse Shar (cuts.*.jsonl.gz beside recording.*.tar, as CutSet.to_shar writes them)
and of webdataset tars (KEY.flac, KEY.wav, KEY.ogg, KEY.mp3 or KEY.opus with KEY.txt or KEY.json,
of which text, speaker and duration are taken). Tars must not be compressed. They are scanned once;
of audio no more than the header is read, and this only where the duration isn't stated. The
manifest holds every recording's place in its tar: build it again when tars have changed.

Word and phone times come from the alignments "word" and "phone" of a Shar's supervisions. lhotse
doesn't move them when it cuts a recording, nor does Shar keep where the cut began: where any lie
outside their supervision, none are taken.
"""

import argparse
import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tarfile import TarFile, TarInfo
from typing import Any, NamedTuple

import soundfile
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.serialization import deserialize_item
from rich.progress import track

from melprobe.audio.load import OFF_BY_SECONDS, BadAudio
from melprobe.corpus.clips import add_on_bad_audio, finish, name_left_out
from melprobe.corpus.manifest import Utterance, check_name, parse_record
from melprobe.errors import UsageError

AUDIO = (".flac", ".wav", ".ogg", ".mp3", ".opus")
PAUSES = {"", "sil", "sp", "spn", "<eps>"}
"""What aligners write where nothing is said, in lower case."""


_MISPLACED = "its alignment lies outside its supervision, so no word and phone times are taken"


class BadShard(BadAudio):
    """A tar or a list of cuts that cannot be read, or not to its end."""


class Misplaced(NamedTuple):
    """A cut whose word or phone times are not those of its own recording."""

    where: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `build shards`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of lhotse Shar or webdataset tars"
    )
    parser.add_argument("--name", required=True, help="what to call the corpus")
    parser.add_argument("--split", default="train", help="default %(default)s")
    add_on_bad_audio(parser)


def build(args: argparse.Namespace, out: Path) -> None:
    """Write the manifest of all tars in the folders. Raises UsageError with the tar and the reason.

    With `--on-bad-audio skip` whatever is whole is taken.
    """
    check_name("--split", args.split)
    # Links resolved: the system follows them before the `..` of a manifest's paths.
    folders = list(dict.fromkeys(folder.resolve() for folder in args.folders))
    top = Path(os.path.commonpath(folders))
    shards = [shard for folder in folders for shard in _shards(folder)]
    utterances: list[Utterance] = []
    left_out: list[str] = []
    misplaced: list[str] = []
    for shard in track(shards, "scanning"):
        for found in _read(shard, top):
            match found:
                case Utterance():
                    utterances.append(replace(found, source=args.name))
                    continue
                case Misplaced():
                    misplaced.append(found.where)
                    continue
            if args.on_bad_audio == "error":
                raise found
            left_out.append(str(found))
    name_left_out(left_out)
    if not utterances:
        raise BadAudio(f"{args.folders[0]}: no recording in its tars is usable")
    if misplaced:
        utterances = [replace(u, words=(), phones=(), times="") for u in utterances]
        name_left_out([f"{misplaced[0]}: {_MISPLACED} ({len(misplaced)} such cuts)"])
    out.mkdir(parents=True, exist_ok=True)
    finish(out.resolve(), {args.split: utterances}, ["bad audio"] * len(left_out))


def _shards(folder: Path) -> list[Path]:
    """Its lists of cuts, or, where it has none, its tars."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    lists = sorted(folder.glob("cuts*.jsonl.gz"))
    shards = lists or sorted(folder.glob("*.tar"))
    if not shards:
        raise UsageError(f"{folder}: holds neither *.tar nor the cuts.*.jsonl.gz of lhotse Shar")
    of_cuts = {_tar_of(path) for path in lists}
    for tar in folder.glob("recording*.tar") if lists else ():
        if tar not in of_cuts:
            raise UsageError(f"{tar}: its cuts are missing, those of others are there")
    return shards


def _tar_of(cuts: Path) -> Path:
    return cuts.with_name("recording" + cuts.name[4:].removesuffix(".jsonl.gz") + ".tar")


def _read(shard: Path, top: Path) -> Iterator[Utterance | BadAudio | Misplaced]:
    """What a shard holds; ids are paths from `top`."""
    try:
        if shard.suffix == ".tar":
            yield from _webdataset(shard, top)
        else:
            yield from _shar(shard, top)
    except BadShard as error:
        yield error


@contextmanager
def _opened(path: Path) -> Iterator[TarFile]:
    try:
        tar = TarFile(path)
    except FileNotFoundError:
        raise BadShard(f"{path}: the file is missing") from None
    except tarfile.TarError as error:
        raise BadShard(f"{path}: not a tar, or a compressed one ({error})") from None
    with tar:
        yield tar


def _scan(tar: TarFile, path: Path) -> tuple[list[TarInfo], list[BadShard]]:
    """The files that are whole in a tar, and what is wrong with it."""
    files: list[TarInfo] = []
    bad: list[BadShard] = []
    end = path.stat().st_size
    try:
        for file in tar:
            files.append(file)
        # Without a word tarfile stops at the first header that is none.
        with path.open("rb") as tail:
            tail.seek(tar.offset)
            whole = tail.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError:
        whole = False
    files = [f for f in files if f.isreg() and f.offset_data + f.size <= end]
    if not whole:
        after = f"after {files[-1].name}" if files else "at its beginning"
        bad = [BadShard(f"{path}: cut short or damaged {after}")]
    for file in files:  # other encodings could not be written into a manifest
        file.name = file.name.encode(errors="surrogateescape").decode(errors="replace")
    return files, bad


def _utterance(
    tar: TarFile, path: Path, audio: TarInfo, record: dict[str, Any], where: str, top: Path
) -> Utterance:
    """That of a manifest's fields. Raises UsageError, with `where` in front."""
    if not audio.size:
        raise BadAudio(f"{where}: {audio.name} is empty (0 bytes)")
    if record.get("duration") is None:
        try:
            record["duration"] = soundfile.info(tar.extractfile(audio)).duration
        except soundfile.LibsndfileError as error:
            reason = f"is not audio that libsndfile reads ({error.error_string.rstrip('.')})"
            raise BadAudio(f"{where}: {audio.name} {reason}") from None
    place = {
        "audio": str(path),
        "bytes": [audio.offset_data, audio.size],
        "id": (path.relative_to(top) / audio.name).as_posix(),
    }
    return parse_record(record | place, path.parent, where)


def _webdataset(path: Path, top: Path) -> Iterator[Utterance | BadAudio]:
    with _opened(path) as tar:
        files, bad = _scan(tar, path)
        yield from bad
        keys: dict[str, dict[str, list[TarInfo]]] = {}
        for file in files:
            # As webdataset takes names apart; what has no key, such as ._a.flac, is no data.
            if match := re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", file.name, re.DOTALL):
                key, kind = match[1], match[2].lower()
                kind = "audio" if f".{kind}".endswith(AUDIO) else kind
                keys.setdefault(key, {}).setdefault(kind, []).append(file)
        if not keys and not bad:
            yield BadShard(f"{path}: holds no files with keys")
        for key, kinds in keys.items():
            where = f"{path}: {key}"
            try:
                audio, record = _clip(tar, kinds, where)
                yield _utterance(tar, path, audio, record, where, top)
            except UsageError as error:
                yield BadAudio(str(error))


def _clip(
    tar: TarFile, kinds: dict[str, list[TarInfo]], where: str
) -> tuple[TarInfo, dict[str, Any]]:
    """A key's recording, and what a manifest says of it."""
    for kind in ("audio", "txt", "json"):
        if len(files := kinds.get(kind, [])) > 1:
            raise BadAudio(f"{where}: two members: {files[0].name} and {files[1].name}")
    if "audio" not in kinds:
        there = ", ".join(file.name for files in kinds.values() for file in files)
        raise BadAudio(f"{where}: no audio ({' '.join(AUDIO)}), only {there}")
    said: dict[str, Any] = {}
    try:
        if "json" in kinds:
            said = json.loads(_content(tar, kinds["json"][0]))
        text = _content(tar, kinds["txt"][0]).strip() if "txt" in kinds else None
    except ValueError as error:
        raise BadAudio(f"{where}: not UTF-8, or not JSON ({error})") from None
    if not isinstance(said, dict):
        raise BadAudio(f"{where}: not a JSON object but {type(said).__name__}")
    if text is not None:
        said["text"] = text
    record = {name: said.get(name) for name in ("text", "duration")}
    if said.get("speaker") is not None:  # often a number
        record["speaker"] = str(said["speaker"])
    return kinds["audio"][0], record


def _content(tar: TarFile, file: TarInfo) -> str:
    content = tar.extractfile(file)
    assert content is not None  # only of a link or a folder
    return content.read().decode("utf-8-sig")


def _shar(path: Path, top: Path) -> Iterator[Utterance | BadAudio | Misplaced]:
    """path: the list of cuts."""
    with _opened(tar_path := _tar_of(path)) as tar:
        files, bad = _scan(tar, tar_path)
        yield from bad
        of_cut: dict[str, list[TarInfo]] = {}
        for file in files:
            name = PurePosixPath(file.name)
            if name.suffix not in (".json", ".nodata", ".nometa"):  # placeholders for no audio
                of_cut.setdefault(str(name.parent / name.stem), []).append(file)
        for where, cut in _cuts(path):
            try:
                record = _said(cut, where)
                own = of_cut.pop(cut.id, [])
                if len(own) != 1:
                    found = " and ".join(file.name for file in own) or "no recording"
                    raise BadAudio(f"{where}: {found} in {tar_path.name}")
                yield _utterance(tar, tar_path, own[0], record, where, top)
                if _is_misplaced(cut):
                    yield Misplaced(where)
            except UsageError as error:
                yield BadAudio(str(error))
        for file in (file for files in of_cut.values() for file in files):
            yield BadAudio(f"{tar_path}: {file.name}: no cut in {path.name}")


def _cuts(path: Path) -> Iterator[tuple[str, Cut]]:
    """(file, line and id; cut) of each line."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                cut = deserialize_item(json.loads(line))
                yield f"{path}:{number}: {cut.id}", cut
    # As many ways as lhotse has of saying that something is not a cut.
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        said = " ".join(str(error).split())
        reason = f"cut short, or not cuts ({type(error).__name__}: {said})"
        raise BadShard(f"{path}:{number}: {reason}") from None


def _is_misplaced(cut: Cut) -> bool:
    return any(
        item.start < s.start - OFF_BY_SECONDS or item.end > s.end + OFF_BY_SECONDS
        for s in cut.supervisions
        for kind in ("word", "phone")
        for item in (s.alignment or {}).get(kind, ())
    )


def _said(cut: Cut, where: str) -> dict[str, Any]:
    """What a manifest says of a cut."""
    if not isinstance(cut, MonoCut | MultiCut) or cut.recording is None:
        raise BadAudio(f"{where}: not a cut of one recording but {type(cut).__name__}")
    if cut.start or abs(cut.duration - cut.recording.duration) > OFF_BY_SECONDS:
        raise BadAudio(f"{where}: is a part of its recording; write the Shar anew from such cuts")
    said = sorted(cut.supervisions, key=lambda s: s.start)
    speakers = {s.speaker for s in said if s.speaker}
    record: dict[str, Any] = {
        "text": " ".join(s.text for s in said if s.text),
        "duration": cut.duration,
        "speaker": speakers.pop() if len(speakers) == 1 else "",
    }
    for field, kind in (("words", "word"), ("phones", "phone")):
        items = [item for s in said for item in (s.alignment or {}).get(kind, ())]
        spans = [(i.symbol, max(0.0, i.start), min(i.end, cut.duration)) for i in items]
        record[field] = [
            [label, round(start, 4), round(end, 4)]
            for label, start, end in spans
            if label.lower() not in PAUSES and start < end
        ]
    return record
