"""`python -m melprobe.corpus build NAME`: make one of the corpora, all of which end in manifests.
`python -m melprobe.corpus align NAME/SPLIT...`: give recordings word and phone times.
`python -m melprobe.corpus textgrid NAME/SPLIT FOLDER`: take such times from Praat TextGrids.
`python -m melprobe.corpus show NAME/SPLIT CLIP --out track.svg`: look at a clip's labels.
`python -m melprobe.corpus pack NAME/SPLIT... --out FOLDER`: many small files into few large tars.

    asterisk  telephone prompts, one speaker (apt packages)
    queen     the voices of a game, some 30 characters (apt package)
    synth     sentences spoken by flite, espeak-ng and festival, with phone and word times
    jsonl     your own manifest, checked, and its audio as 16 kHz FLAC
    hub       a Hugging Face data set by id
    shards    lhotse Shar or webdataset tars, left where and as they are

A corpus is then named as NAME/SPLIT wherever a manifest is wanted: `queen/test`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from melprobe.cache import cache_dir
from melprobe.corpus import align, pack, show, textgrid
from melprobe.corpus.manifest import BUILDABLE, check_name
from melprobe.errors import Parser, run

CORPORA = {name: f"melprobe.corpus.{name}" for name in ("asterisk", "queen", "synth", "hub")}
CORPORA |= {"jsonl": "melprobe.corpus.user", "shards": "melprobe.corpus.tars"}


def main(argv: Sequence[str] | None = None) -> None:
    """Build the corpus that `argv` names, or do what else it says; each has its own options."""
    parser = Parser(
        prog="python -m melprobe.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="make a corpus")
    build.add_argument("corpus", choices=list(CORPORA))
    build.add_argument("options", nargs=argparse.REMAINDER, help="see build CORPUS --help")
    others = {
        "align": (align, "give recordings word and phone times"),
        "textgrid": (textgrid, "take word and phone times from Praat TextGrids"),
        "show": (show, "draw a clip's labels over its spectrogram"),
        "pack": (pack, "many small files into few large tars"),
    }
    for action, (module, told) in others.items():
        other = actions.add_parser(
            action,
            help=told,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(other)
        other.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.action in others:
        args.run(args)
        return
    corpus = import_module(CORPORA[args.corpus])
    own = Parser(
        prog=f"python -m melprobe.corpus build {args.corpus}",
        description=corpus.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    corpus.add_arguments(own)
    options = own.parse_args(args.options)
    name = getattr(options, "name", None)
    if name is not None:
        check_name("--name", name, {"builtin", *BUILDABLE} - {args.corpus})
    corpus.build(options, cache_dir("corpora").absolute() / (name or args.corpus))


if __name__ == "__main__":
    run(main, resumable=sys.argv[1:3] == ["build", "synth"])
