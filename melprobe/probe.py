"""`python -m melprobe.probe CAPTURE --out DIR`: what can be read from each layer, by linear probes.

CAPTURE is a folder of `python -m melprobe.capture`. Probes are trained on some of its clips, choose
their penalty on others and are tested on the rest, which share neither a sentence nor a voice with
the first (for `speaker`, no sentence). Beside every layer stand the raw mel patches, the commonest
class, a control task of random labels, and each --floor: another model's capture of the same clips,
such as a randomly initialised one's. In DIR: rows.parquet, results.json and profile.svg.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from melprobe.captured import Capture
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.folders import replace_files
from melprobe.probing.labels import CLASSED, LABELS, TIMED, label
from melprobe.probing.origin import AUTOMATIC, origins, untimed
from melprobe.probing.scores import score_labels
from melprobe.probing.sources import MEL, MODEL, capture_series, mel_series, open_floors
from melprobe.probing.study import RIDGE, describe, make_plan, parse_labels, run_plan
from melprobe.report.profile import profile
from melprobe.store import provenance

SCHEMA = 1
WIDTH = 110
"""Columns of the table at least: a pipe has 80, which would cut numbers."""


def parser() -> Parser:
    p = Parser(prog="python -m melprobe.probe", description=__doc__)
    p.add_argument("capture", type=Path, help="folder of a capture")
    p.add_argument("--out", type=Path, required=True, help="folder for rows, scores and figure")
    p.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="NAME=CAPTURE",
        help="another model's capture of the same clips; can be given more than once",
    )
    p.add_argument("--labels", default="all", help=f"of {','.join(LABELS)} (default: all)")
    p.add_argument(
        "--logistic",
        default="",
        metavar="LABELS",
        help="of these, read by logistic regression too, which takes longer, and measured by the "
        f"online code: {','.join(CLASSED)} or all",
    )
    p.add_argument("--data", type=Path, help="the capture's manifest, if it has moved")
    p.add_argument("--seed", type=int, default=0, help="of splits, control tasks and resamples")
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Probe a capture, write what was found, and print the best layer for each label."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    names = parse_labels("--labels", options.labels)
    logistic = parse_labels("--logistic", options.logistic, CLASSED) if options.logistic else []
    device = _device(options.device)
    floors = _floors(options.floor)
    check_writable(options.out, f"--out {options.out}")
    capture = Capture.open(options.capture)
    series = [capture_series(MODEL, capture), *open_floors(floors, capture)]
    labelled = label(capture, options.data)
    series.append(mel_series(labelled.patches))
    plan = make_plan(labelled, names, options.seed, logistic)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("probing", total=sum(len(each.layers) for each in series))
        rows = run_plan(plan, series, device, lambda: progress.advance(bar))
    command = ["python -m melprobe.probe", *map(shlex.quote, words)]
    scores = score_labels(rows, names, options.seed)
    for name in scores.keys() & set(TIMED):
        scores[name]["times"] = origins(labelled.utterances, words=name == "word")
    results = {
        "schema": SCHEMA,
        "capture": {name: capture.index.get(name) for name in ("checkpoint", "data", "settings")},
        "labels": scores,
        "untimed": untimed(labelled.utterances),
        "splits": describe(plan),
        "unable": plan.unable,
        **provenance(seed=options.seed, command=command),
    }

    def write(folder: Path) -> None:
        rows.to_parquet(folder / "rows.parquet")
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / "profile.svg").write_text(profile(results), encoding="utf-8")

    replace_files(options.out, write)
    show(results, Console(width=max(Console().width, WIDTH)))
    print(f"{options.out / 'profile.svg'}")


def _device(name: str | None) -> torch.device:
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
        raise UsageError(f"--device {name}: not there; take cpu, or leave it out") from None
    return found


def _floors(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--floor {text}: write NAME=CAPTURE, such as random=captures/random")
        if name in found:
            raise UsageError(f"--floor {text}: {name} is given twice")
        found[name] = Path(folder)
    return found


def show(results: Mapping[str, Any], console: Console) -> None:
    """The best layer for each label beside the floors, and what could not be probed."""
    others = [
        series["series"]
        for label in list(results["labels"].values())[:1]
        for series in label["series"]
        if series["series"] not in (MODEL, MEL) and series["probe"] == RIDGE
    ]
    floors = (*others, MEL, "commonest", "control")
    table = Table("label", "best", "among", "score", "95 %", *floors, box=None)
    for name, found in results["labels"].items():
        by_name = {s["series"]: s for s in found["series"] if s["probe"] == RIDGE}
        model = by_name[MODEL]
        best = max(range(len(model["layers"])), key=model["score"].__getitem__)
        peak = model.get("peak")
        table.add_row(
            name if found["measure"] == "accuracy" else f"{name} ({found['measure']})",
            model["layers"][best],
            "–".join(dict.fromkeys(peak["limits"])) if peak else "",
            _number(model["score"][best]),
            _limits(model["limits"][best]),
            *(_number(max(by_name[other]["score"])) for other in others),
            _number(by_name[MEL]["score"][0]),
            _number(found["majority"]),
            _number(model["selectivity"]["control"][best]) if "selectivity" in model else "",
        )
    console.print(table)
    for name, split in results["splits"].items():
        if split["dropped_clips"] and not name.startswith("control:"):
            console.print(f"{name}: {split['dropped_clips']} clips dropped, in two splits at once")
        if not split["voices_apart"] and name != "speaker":
            console.print(f"{name}: voices are in all splits (there are fewer than three)")
    _show_times(results, console)
    for name, reason in results["unable"].items():
        console.print(f"{name}: not probed, {reason}")


def _show_times(results: Mapping[str, Any], console: Console) -> None:
    """Where the times of labels come from, and how many clips have none."""
    told: dict[str, list[str]] = {}
    for name, found in results["labels"].items():
        if times := found.get("times"):
            text = ", ".join(f"{kind} ({count:,} clips)" for kind, count in times.items())
            edges = "; their edges are automatic" if times.keys() & set(AUTOMATIC) else ""
            told.setdefault(f"times: {text}{edges}", []).append(name)
    for text, names in told.items():
        console.print(f"{', '.join(names)}: {text}", highlight=False)
    asked = results["labels"].keys() | results["unable"].keys()
    if (missing := results["untimed"]) and asked & set(TIMED):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in missing.items())
        console.print(
            f"clips without times: {sum(missing.values()):,} ({reasons})", highlight=False
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _limits(limits: Sequence[float] | None) -> str:
    return "" if limits is None else f"{limits[0]:.2f}–{limits[1]:.2f}"


if __name__ == "__main__":
    run(main)
