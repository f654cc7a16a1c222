"""`python -m melprobe.bench WHAT --json`: how fast, beside what others offer, on this machine.

`mel`: the log-mel front end. `sweep`: a layer-skip study, beside the same study by nnsight,
TransformerLens and plain hooks around `generate`.
"""

import json
import sys
from collections.abc import Mapping, Sequence

from melprobe.analysis.protocol import answer_limit, choose
from melprobe.audio.load import load_utterance
from melprobe.bench.contestants import RIVALS, Study
from melprobe.bench.mel import bench_mel
from melprobe.bench.sweep import bench_sweep
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, run
from melprobe.hooks.layers import parse_layers
from melprobe.listener import DTYPES, load
from melprobe.model.checkpoint import DEFAULT


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its figures."""
    p = Parser(prog="python -m melprobe.bench", description=__doc__)
    what = p.add_subparsers(dest="what", required=True)
    mel = what.add_parser("mel", help="the log-mel front end")
    sweep = what.add_parser("sweep", help="a layer-skip study")
    for part in (mel, sweep):
        part.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    sweep.add_argument("--checkpoint", default=DEFAULT)
    sweep.add_argument("--data", default="builtin/test")
    sweep.add_argument("--limit", type=int, default=30, help="number of utterances (0: all)")
    sweep.add_argument("--layers", help="single skips of these blocks, such as 0-9; default all")
    sweep.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    sweep.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    sweep.add_argument("--dtype", choices=DTYPES, help="by default what the device multiplies fast")
    sweep.add_argument("--nll-only", action="store_true", help="likelihoods, no transcripts")
    options = p.parse_args(argv)
    figures: Mapping[str, object]
    if options.what == "mel":
        figures = bench_mel()
    else:
        listener = load(options.checkpoint, device=options.device, dtype=DTYPES.get(options.dtype))
        utterances = choose(read_manifest(find_manifest(options.data)), options.limit, seed=0)
        n = listener.n_layers
        study = Study(
            listener,
            [load_utterance(u) for u in utterances],
            [u.text for u in utterances],
            parse_layers(options.layers, n) if options.layers else range(n),
            0 if options.nll_only else answer_limit(listener, utterances),
        )
        figures = bench_sweep(study, options.rivals, lambda line: print(line, file=sys.stderr))
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    run(main)
