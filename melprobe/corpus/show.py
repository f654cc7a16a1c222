"""`python -m melprobe.corpus show NAME CLIP --out track.svg`: a clip's labels over its spectrogram.

For a person to check: word and phone times as the manifest has them, and below them the one label
that each patch gets from them, which probes are trained on; F0 and energy by frame and by patch.
CLIP is an utterance's id, or the name of its file without the ending.
"""

import argparse
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.errors import UsageError, check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `show`."""
    add = parser.add_argument
    add("manifest", metavar="NAME", help="such as queen/train, or a manifest file")
    add("clip", metavar="CLIP", help="such as audio/vm-intro.flac, or vm-intro")
    add("--out", type=Path, required=True, metavar="FILE.svg")
    add(
        "--patches-per-second",
        type=float,
        default=12.5,
        metavar="RATE",
        help="as the model has them (default %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Draw a clip. Raises UsageError: no such manifest, clip or rate, or audio that is unusable."""
    # They bring in torch, which takes seconds, and that no other command here needs.
    from melprobe.audio.patches import FRAMES_PER_PATCH
    from melprobe.probing.picture import picture
    from melprobe.report.track import draw_track

    if args.patches_per_second not in FRAMES_PER_PATCH:
        rates = ", ".join(f"{rate:g}" for rate in FRAMES_PER_PATCH)
        raise UsageError(f"--patches-per-second {args.patches_per_second:g}: there are {rates}")
    if args.out.is_dir():
        raise UsageError(f"--out {args.out}: this is a folder; name a file in it")
    folder = args.out.absolute().parent
    check_writable(folder, f"--out {args.out}")
    path = find_manifest(args.manifest)
    u = find_clip(read_manifest(path), args.clip, path)
    svg = draw_track(picture(u, FRAMES_PER_PATCH[args.patches_per_second]))
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{args.out.name}.{os.getpid()}"
    draft.write_text(svg, encoding="utf-8")
    draft.replace(args.out)
    print(args.out)


def find_clip(utterances: Sequence[Utterance], name: str, path: Path) -> Utterance:
    """The utterance of that id, or else of that file name; UsageError unless there is one."""
    by_id = {u.id: u for u in utterances}
    if name in by_id:
        return by_id[name]
    named = [u for u in utterances if name in (PurePosixPath(u.id).name, PurePosixPath(u.id).stem)]
    if len(named) == 1:
        return named[0]
    if named:
        raise UsageError(f"{path}: {name} may be {named[0].id} or {named[1].id}; say which")
    stems = {PurePosixPath(u.id).stem: u.id for u in utterances}
    nearest = get_close_matches(PurePosixPath(name).stem, stems, cutoff=0)
    there = ", ".join(stems[stem] for stem in nearest)
    raise UsageError(f"{path}: has no clip {name}; the nearest are {there}")
