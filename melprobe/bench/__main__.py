"""`python -m melprobe.bench WHAT --json`: how fast, beside what others offer, on this machine.

`mel`: the log-mel front end. `sweep`: a layer-skip study, beside the same study by nnsight,
TransformerLens and plain hooks around `generate`. `capture`: residuals to disk, beside the forward
pass alone. `train`: training steps, beside those of the Hugging Face Trainer. `compare`: a grid of
debiased CKA, beside ckatorch. `probe`: linear probes of all layers and labels, beside a loop over
scikit-learn's.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from melprobe.analysis.protocol import answer_limit, choose
from melprobe.audio.load import load_utterance
from melprobe.bench.capture import bench_capture, peak_memory
from melprobe.bench.compare import bench_compare
from melprobe.bench.contestants import RIVALS, Study
from melprobe.bench.mel import bench_mel
from melprobe.bench.probe import FEWEST_ROWS, Sizes, bench_probe
from melprobe.bench.sweep import bench_sweep
from melprobe.bench.train import bench_train
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, run
from melprobe.hooks.layers import parse_layers
from melprobe.listener import DTYPES, load
from melprobe.model.checkpoint import DEFAULT, find_checkpoint
from melprobe.training.recipe import SpeechRecipe
from melprobe.training.recipe_file import read_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its figures."""
    p = Parser(prog="python -m melprobe.bench", description=__doc__)
    what = p.add_subparsers(dest="what", required=True)
    mel = what.add_parser("mel", help="the log-mel front end")
    sweep = what.add_parser("sweep", help="a layer-skip study")
    capture = what.add_parser("capture", help="residuals to disk")
    train = what.add_parser("train", help="training steps")
    compare = what.add_parser("compare", help="a grid of debiased CKA")
    probe = what.add_parser("probe", help="linear probes of all layers and labels")
    for part in (mel, sweep, capture, train, compare, probe):
        part.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    for part in (sweep, capture):
        part.add_argument("--checkpoint", default=DEFAULT)
        part.add_argument("--data", default="builtin/test")
        part.add_argument("--limit", type=int, default=30, help="number of utterances (0: all)")
        part.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
        part.add_argument(
            "--dtype", choices=DTYPES, help="by default what the device multiplies fast"
        )
    sweep.add_argument("--layers", help="single skips of these blocks, such as 0-9; default all")
    sweep.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    sweep.add_argument("--nll-only", action="store_true", help="likelihoods, no transcripts")
    capture.add_argument(
        "--memory",
        nargs="*",
        type=int,
        default=[50, 100, 200],
        metavar="N",
        help="also the most memory that capturing N utterances takes",
    )
    which = train.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", default=DEFAULT, help="train as it was trained")
    which.add_argument("--recipe", type=Path, help="or by this recipe")
    train.add_argument("--data", default="builtin/train")
    train.add_argument("--steps", type=int, default=40, help="after the warm-up")
    train.add_argument(
        "--batch-seconds", type=float, help="audio in a batch; the recipe's if not given"
    )
    train.add_argument("--device", choices=("cpu", "cuda"), help="the best there is by default")
    compare.add_argument("--layers", type=int, default=31, help="a grid of so many (%(default)s)")
    compare.add_argument("--frames", type=int, default=100_000)
    compare.add_argument("--width", type=int, default=576)
    for name, size in Sizes()._asdict().items():
        probe.add_argument(f"--{name}", type=int, default=size, help="(default: %(default)s)")
    probe.add_argument("--device", choices=("cpu", "cuda"), help="the best there is by default")
    options = p.parse_args(argv)
    commands = {
        "mel": lambda _: bench_mel(),
        "sweep": _sweep,
        "capture": _capture,
        "train": _train,
        "compare": _compare,
        "probe": _probe,
    }
    figures: Mapping[str, object] = commands[options.what](options)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")


def _sweep(options: Any) -> Mapping[str, object]:
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
    return bench_sweep(study, options.rivals, _tell)


def _capture(options: Any) -> Mapping[str, object]:
    if few := [n for n in options.memory if n < 1]:
        raise UsageError(f"--memory {few[0]}: take a number of utterances")
    known = read_manifest(find_manifest(options.data))
    words = ["--checkpoint", options.checkpoint]
    words += ["--device", options.device] if options.device else []
    words += ["--model-dtype", options.dtype] if options.dtype else []
    peak = peak_memory(known, options.memory, words)
    listener = load(options.checkpoint, device=options.device, dtype=DTYPES.get(options.dtype))
    found = bench_capture(listener, choose(known, options.limit, seed=0), _tell)
    return {**found, "peak_mb": peak}


def _train(options: Any) -> Mapping[str, object]:
    if options.steps < 1:
        raise UsageError(f"--steps {options.steps}: take at least one")
    path = options.recipe or find_checkpoint(options.checkpoint) / "recipe.json"
    recipe = read_recipe(path)  # JSON is YAML too
    if not isinstance(recipe, SpeechRecipe):
        raise UsageError(f"{path}: trains on text alone; take a recipe for speech")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    disable_progress_bar()
    with redirect_stdout(sys.stderr):  # both tell of their steps
        return bench_train(
            recipe, options.data, options.steps, options.batch_seconds, device, _tell
        )


def _compare(options: Any) -> Mapping[str, object]:
    for name, least in (("layers", 1), ("frames", 1024), ("width", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: take at least {least}")
    return bench_compare(options.layers, options.frames, options.width, _tell)


def _probe(options: Any) -> Mapping[str, object]:
    sizes = Sizes(options.layers, options.rows, options.width, options.timed)
    for name, size in sizes._asdict().items():
        if size < 1 or (name == "rows" and size < FEWEST_ROWS):
            least = FEWEST_ROWS if name == "rows" else 1
            raise UsageError(f"--{name} {size}: take at least {least}")
    if sizes.timed > sizes.layers:
        raise UsageError(f"--timed {sizes.timed}: there are {sizes.layers} layers")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return bench_probe(sizes, device, _tell)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
