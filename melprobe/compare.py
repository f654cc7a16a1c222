"""`python -m melprobe.compare A [B] --out DIR`: how alike layers are, in one model or between two.

A and B are captures of the same utterances (`python -m melprobe.capture --positions speech`); B may
also be `mel`, the raw log-mel patches of A's clips. The index is debiased linear CKA on frames at
the same times, on residuals h and on what blocks add (Δ), raw and standardised. Beside each value
stand its 95 % band and its floor: the same of re-paired utterances (of one speaker, like in length,
with other words) after the same search over lags. Within one model, layers are held against the
next; DIR has every layer with every layer in `results.json` and `similarity.svg`, and what each
utterance contributes in `rows.parquet`.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from melprobe.analysis.comparison import REAL, REPAIRED, Compared, Comparison
from melprobe.analysis.comparison_scores import findings
from melprobe.analysis.raw_mel import RawMel
from melprobe.analysis.views import Speech
from melprobe.captured import Capture
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.folders import replace_files
from melprobe.report.similarity import heat_map
from melprobe.store import provenance

SCHEMA = 1
MEL = "mel"
SYMBOLS = {"h": "h", "delta": "Δ"}


def parser() -> Parser:
    p = Parser(prog="python -m melprobe.compare", description=__doc__)
    p.add_argument("a", type=Path, metavar="A", help="folder of a capture")
    p.add_argument(
        "b",
        nargs="?",
        metavar="B",
        help=f"another model's, or {MEL} for A's raw log-mel patches; none: within A",
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the results")
    p.add_argument(
        "--lags",
        type=int,
        default=2,
        help="how many frames B may be early or late, between two models (%(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="draws the minibatches")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, write, print."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    if not 0 <= options.lags <= 25:
        raise UsageError(f"--lags {options.lags}: take 0 to 25")
    check_writable(options.out, f"--out {options.out}")
    a = Speech(Capture.open(options.a))
    b = a
    if options.b == MEL:
        b = RawMel(a.captured)
    elif options.b:
        b = Speech(Capture.open(options.b))
        check_same_utterances(a.captured, b.captured)
    lags = range(-options.lags, options.lags + 1) if options.b else (0,)
    comparison = Comparison(a, b, lags, options.seed)
    if not comparison.pairs("h"):
        raise UsageError(
            f"{options.a}: one residual alone has no next one; capture more --layers"
            if comparison.within
            else f"{options.b}: has no residual that {options.a} has; capture the same --layers"
        )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("comparing", total=2 * len(comparison.utterances))
        compared = comparison.run(partial(progress.advance, bar))
    command = ["python -m melprobe.compare", *map(shlex.quote, words)]
    results = {
        **described(comparison, compared),
        **findings(compared),
        **provenance(seed=options.seed, command=command),
    }
    write(options.out, results, compared)
    show(results)
    print(f"results: {options.out}")


def check_same_utterances(a: Capture, b: Capture) -> None:
    """UsageError unless both heard the same clips with the same words."""
    first, second = a.utterances, b.utterances
    common = first.index.intersection(second.index)
    if len(common) < max(len(first), len(second)):
        raise UsageError(
            f"{b.folder}: {len(second)} utterances, of which {len(common)} are among the "
            f"{len(first)} of {a.folder}; capture both with the same --data, --limit and --seed"
        )
    differing = common[first.text[common] != second.text[common]]
    if len(differing):
        raise UsageError(
            f"{b.folder}: {differing[0]} has other words than in {a.folder}; "
            "capture both with the same --data"
        )


def described(what: Comparison, compared: Compared) -> dict[str, Any]:
    """What was compared, and the grids; JSON throughout."""
    counts = {}
    for pairing in (REAL, REPAIRED):
        rows = compared.rows[compared.rows.pairing == pairing]
        once = rows.drop_duplicates("utterance")
        counts[pairing] = {"utterances": len(once), "frames": int(once.frames.sum())}
    return {
        "schema": SCHEMA,
        "kind": "mel" if isinstance(what.b, RawMel) else "within" if what.within else "between",
        "a": _about(what.a),
        "b": _about(what.b) if what.b.captured is not what.a.captured else None,
        "counts": counts,
        "lags": list(what.lags),
        "grids": [
            {
                **view._asdict(),
                "layers_a": what.a.layers(view.of),
                "layers_b": what.b.layers(view.of),
                "cka": [[None if np.isnan(x) else round(x, 6) for x in row] for row in grid],
            }
            for view, grid in ((view, grid.tolist()) for view, grid in compared.grids.items())
        ],
    }


def _about(speech: Speech) -> dict[str, Any]:
    index = speech.captured.index
    return {
        "capture": str(speech.captured.folder),
        "checkpoint": index.get("checkpoint"),
        "data": index.get("data"),
        "blocks": index["blocks"],
        "patches_per_second": speech.rate,
    }


def write(out: Path, results: dict[str, Any], compared: Compared) -> None:
    """results.json, rows.parquet, similarity.svg; each whole or not at all."""

    def fill(folder: Path) -> None:
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        (folder / "results.json").write_text(text, encoding="utf-8")
        (folder / "similarity.svg").write_text(heat_map(results), encoding="utf-8")
        compared.rows.to_parquet(folder / "rows.parquet", index=False)

    replace_files(out, fill)


def show(results: dict[str, Any]) -> None:
    """One table for each scaling: a row for each pair of layers, h and Δ."""
    console = Console()
    within = results["kind"] == "within"
    for scaling in ("raw", "standardised"):
        table = Table(title=f"debiased linear CKA, {scaling}", title_justify="left")
        table.add_column("layers" if within else "layer", justify="right")
        for symbol in SYMBOLS.values():
            for column in (symbol, "95 % band", "floor"):
                table.add_column(column, justify="right")
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for pair in results["pairs"]:
            if pair["scaling"] == scaling:
                found.setdefault((pair["layer_a"], pair["layer_b"]), {})[pair["of"]] = pair
        for (layer_a, layer_b), of in found.items():
            cells = [cell for name in SYMBOLS for cell in _cells(of.get(name))]
            table.add_row(f"{layer_a}, {layer_b}" if within else str(layer_a), *cells)
        console.print(table)


def _cells(pair: dict[str, Any] | None) -> tuple[str, str, str]:
    if pair is None or pair["cka"] is None:
        return "", "", ""
    ends, floor = pair["cka_ci"], pair["floor"]
    band = f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else "none"
    return f"{pair['cka']:.2f}", band, "none" if floor is None else f"{floor:.2f}"


if __name__ == "__main__":
    run(main)
