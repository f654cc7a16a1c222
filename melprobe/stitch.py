"""`python -m melprobe.stitch A B`: do the blocks of two models do one another's work?

Two checkpoints over one base, such as the arms of a pair. For every block l, what A's blocks below
l make goes into B's blocks from l on, and the other way round: as it is, and through an affine map
that was fitted on other clips (--fit). And each arm gets the other's block l alone, which exchanges
what their adapters changed in it: its weights, or its work between the maps. Damage is normalised,
with bands over all blocks at once.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from melprobe.analysis.findings import checkpoint_name, describe_checkpoint
from melprobe.analysis.protocol import choose, leave_out_too_long, of_length
from melprobe.analysis.stitching import (
    ARMS,
    EXCHANGED,
    STITCHED,
    Pair,
    check_pair,
    fit_maps,
    gate_of,
    score_stitching,
    stitch_rows,
)
from melprobe.analysis.study import swap_partners
from melprobe.audio.load import load_usable
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.folders import replace_files
from melprobe.listener import DTYPES, load
from melprobe.model.checkpoint import find_checkpoint, read_config
from melprobe.model.exit import check_reached
from melprobe.store import provenance

SCHEMA = 1
_TOLD = dict(
    zip(
        (*STITCHED, *EXCHANGED),
        (
            "stitched as they are",
            "stitched through a fitted affine map",
            "one block exchanged",
            "one block exchanged, between fitted affine maps",
        ),
        strict=True,
    )
)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the maps, stitch, write rows and scores, print the table."""
    words = list(sys.argv[1:] if argv is None else argv)
    p = Parser(prog="python -m melprobe.stitch", description=__doc__)
    p.add_argument("a", metavar="A", help="checkpoint: name under checkpoints/, or a folder")
    p.add_argument("b", metavar="B", help="another over the same base")
    p.add_argument("--data", default="builtin/test", help="manifest, or name like queen/test")
    p.add_argument("--fit", default="builtin/train", help="manifest that the maps are fitted on")
    p.add_argument("--limit", type=int, default=100, help="number of clips (0: all)")
    p.add_argument(
        "--fit-limit", type=int, default=100, help="and of those that maps are fitted on"
    )
    p.add_argument("--lengths", metavar="A-B", help="only clips that last A to B seconds")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--dtype", choices=DTYPES, help="by default what the device multiplies fast")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    p.add_argument("--out", type=Path, help="folder of the run; by default under reports/")
    options = p.parse_args(words)
    folders = [find_checkpoint(name) for name in (options.a, options.b)]
    configs = [read_config(folder) for folder in folders]
    for config in configs:
        check_reached(config, range(config.text_config.num_hidden_layers))
    check_pair(*configs)
    names = [checkpoint_name(folder) for folder in folders]
    data = options.data.removesuffix(".jsonl").replace("/", "-").strip("-.")
    out = options.out or Path("reports") / f"stitch-{names[0]}-{names[1]}-{data}"
    check_writable(out, f"--out {out}")
    pair = Pair(*(load(f, device=options.device, dtype=DTYPES.get(options.dtype)) for f in folders))
    tested = _clips(options.data, options.limit, options, pair)
    fitted = _clips(options.fit, options.fit_limit, options, pair)
    _check_apart(tested, fitted, options)
    partners = swap_partners(tested.utterances)
    with Progress(console=Console(stderr=True)) as progress:
        progress.add_task("fitting maps", total=None)
        maps = fit_maps(pair, fitted.waves, fitted.texts)
        bar = progress.add_task("stitching", total=len(tested.waves))
        rows = stitch_rows(
            pair, maps, tested.waves, partners, tested.texts, lambda n: progress.advance(bar, n)
        )
    speakers = [u.speaker for u in tested.utterances]
    results = {
        "schema": SCHEMA,
        "arms": {
            arm: describe_checkpoint(folder, lm)
            for arm, folder, lm in zip(ARMS, folders, pair, strict=True)
        },
        "gates": {
            arm: gate_of(
                rows, arm, lm, tested.waves, partners, tested.texts, speakers, options.seed
            )
            for arm, lm in zip(ARMS, pair, strict=True)
        },
        **score_stitching(rows, speakers, options.seed),
        "maps_r2": {arm: [m.r2 for m in of_arm] for arm, of_arm in maps.items()},
        "data": {"name": options.data, "clips": len(tested.waves), "left_out": tested.left_out},
        "fit": {"name": options.fit, "clips": len(fitted.waves), "left_out": fitted.left_out},
        **provenance(seed=options.seed, command=["python -m melprobe.stitch", *words]),
    }
    rows.insert(1, "utterance", [tested.utterances[clip].id for clip in rows["clip"]])

    def write(folder: Path) -> None:
        rows.to_parquet(folder / "rows.parquet", index=False)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    replace_files(out, write)
    _show(results)
    print(f"results: {out / 'results.json'}")


class _Clips(NamedTuple):
    """What both models can hear of a manifest."""

    utterances: list[Utterance]
    waves: list[np.ndarray]
    texts: list[str]
    left_out: list[str]


def _clips(name: str, limit: int, options: Any, pair: Pair) -> _Clips:
    listed = of_length(read_manifest(find_manifest(name)), options.lengths)
    drawn = choose(listed, limit, options.seed)
    usable, waves, left_out = load_usable(drawn, options.on_bad_audio)
    for lm in pair:
        left_out += leave_out_too_long(lm, usable, waves, options.on_bad_audio)
    return _Clips(usable, waves, [plain_text(u.text) for u in usable], left_out)


def _check_apart(tested: _Clips, fitted: _Clips, options: Any) -> None:
    """A map that has seen what it is tested on can carry over what isn't there."""
    if shared := set(tested.texts) & set(fitted.texts):
        example = min(shared)
        raise UsageError(
            f"--fit {options.fit}: says {len(shared)} of the texts of --data {options.data} as "
            f"well, such as {example!r}: fit the maps on other clips"
        )


def _show(results: dict[str, Any]) -> None:
    console = Console()
    for arm, gate in results["gates"].items():
        passed = "passed" if gate["passed"] else "NOT passed: nothing below speaks of listening"
        name = results["arms"][arm]["name"]
        console.print(f"{arm}, {name}: listening gate {passed}; {gate['reason']}", soft_wrap=True)
    found = {(x["arm"], x["condition"], x["layer"]): x for x in results["layers"]}
    for condition, told in _TOLD.items():
        table = Table("block l", title=told, title_justify="left")
        for arm, other in (ARMS, ARMS[::-1]):
            stitched = f"{other} below l, {arm} from l on"
            table.add_column(f"{arm} with {other}'s l" if condition in EXCHANGED else stitched)
        for layer in range(1 + max(x["layer"] for x in results["layers"])):
            table.add_row(str(layer), *(_cell(found[arm, condition, layer]) for arm in ARMS))
        console.print(table)
    console.print(
        "Damage d with its 95 % band over all blocks: of stitched models beside "
        f"{results['worse']}, which hears less; of an exchanged block beside the arm that got it.",
        soft_wrap=True,
    )


def _cell(layer: dict[str, Any]) -> str:
    if layer["damage"] is None:
        return "-"
    band = layer["damage_ci"]
    limits = f" [{band[0]:.2f}, {band[1]:.2f}]" if band else ""
    return f"{layer['damage']:.2f}{limits}"


if __name__ == "__main__":
    run(main)
