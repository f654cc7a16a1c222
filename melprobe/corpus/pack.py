"""`python -m melprobe.corpus pack NAME... --out FOLDER`: many small files into few large tars.

Writes webdataset tars (NUMBER.flac, or as a recording's file ends, and NUMBER.json with what the
manifest says) and manifests of them, named as those that were given. Bytes are copied as they are
and not decoded, and ids stay the same, so results do too. The folder must be new: it appears at the
end with all that is in it. A run that is stopped has to begin again; one that is killed leaves a
folder .FOLDER-... beside it.
"""

import argparse
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tarfile import TarFile, TarInfo
from tempfile import TemporaryDirectory

from rich.progress import track

from melprobe.audio.load import BadAudio, recording_bytes
from melprobe.corpus.clips import add_on_bad_audio, name_left_out, show
from melprobe.corpus.manifest import (
    Bytes,
    Utterance,
    find_manifest,
    read_manifest,
    to_record,
    write_manifest,
)
from melprobe.errors import UsageError, check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pack`."""
    add = parser.add_argument
    add("manifests", nargs="+", metavar="NAME", help="such as queen/train, or a manifest file")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    add("--shard-mb", type=float, default=500, help="of one tar, about (default %(default)s)")
    add_on_bad_audio(parser)


def run(args: argparse.Namespace) -> None:
    """Pack manifests. Raises UsageError: no such manifest, folder not new, a missing recording."""
    if not args.shard_mb > 0:
        raise UsageError(f"--shard-mb {args.shard_mb}: take more than 0")
    out = args.out.resolve()
    check_writable(out.parent, str(args.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {args.out}: is there already; name a new folder")
    splits: dict[str, list[Utterance]] = {}
    for path in map(find_manifest, args.manifests):
        if path.stem in splits:
            raise UsageError(f"{path}: a second manifest called {path.stem}; pack it elsewhere")
        splits[path.stem] = read_manifest(path)
    left_out: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        draft = Path(place) / "new"  # as readable as any folder, which `place` is not
        draft.mkdir()
        for split, utterances in splits.items():
            tars = _Tars(draft, split, args.shard_mb * 1e6)
            packed = []
            for utterance in track(utterances, f"packing {split}"):
                try:
                    packed.append(tars.add(utterance))
                except BadAudio as error:
                    if args.on_bad_audio == "error":
                        raise
                    left_out.append(str(error))
            tars.close()
            if not packed:
                raise BadAudio(f"{split}: no recording is usable; the first: {left_out[-1]}")
            write_manifest(draft / f"{split}.jsonl", packed)
            splits[split] = packed
        draft.rename(out)
    name_left_out(left_out)
    show(out, splits, ["bad audio"] * len(left_out))


class _Tars:
    """The tars of a split: SPLIT-000000.tar and so on."""

    def __init__(self, folder: Path, split: str, most: float):
        """most: bytes of a tar; a recording that has more gets one of its own."""
        self.folder, self.split, self.most = folder, split, most
        self.tar: TarFile | None = None
        self.tars = self.clips = 0

    def add(self, utterance: Utterance) -> Utterance:
        """The same in a tar. Raises BadAudio where there is no file, or an empty one."""
        data = recording_bytes(utterance)
        if not data:
            raise BadAudio(f"{utterance.place}: the file is empty (0 bytes)")
        if self.tar is None or self.tar.offset + len(data) > self.most:
            self.close()
            path = self.folder / f"{self.split}-{self.tars:06d}.tar"
            self.tar = TarFile(path, "x")
            self.tars += 1
        key = f"{self.clips:08d}"
        self.clips += 1
        said = to_record(utterance, self.folder) | {"id": utterance.id}
        del said["audio"]
        said.pop("bytes", None)
        suffix = PurePosixPath(utterance.id).suffix.lower() or ".audio"
        offset = _put(self.tar, key + suffix, data)
        _put(self.tar, f"{key}.json", json.dumps(said, ensure_ascii=False).encode())
        place = Bytes(offset, len(data))
        return replace(utterance, audio=Path(str(self.tar.name)), bytes=place)

    def close(self) -> None:
        """Write the end of the tar that is open."""
        if self.tar is not None:
            self.tar.close()


def _put(tar: TarFile, name: str, data: bytes) -> int:
    """Append a file; where its bytes begin."""
    info = TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return tar.offset - blocks * tarfile.BLOCKSIZE
