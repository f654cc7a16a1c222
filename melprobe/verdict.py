"""`python -m melprobe.verdict STUDY.yaml`: which layers are encoder-agnostic, and which listen?

STUDY.yaml names one arm or the two of a matched pair, each with its training runs, a reader as
control, clips, and margins. Every block is judged on two axes. Need: for speech, text, both or
neither; agreement of the arms: agnostic or specific. Or undecided, which is a full answer. All that
is missing of the evidence is made first (skipping, copying, captures, probes, similarity,
stitching), each by a command that is printed and kept; stopped and started again, it goes on. In
the folder of the result: verdict.json (docs/verdict.md), verdict.svg, and the evidence.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from melprobe.analysis.stitching import check_pair
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.folders import held, replace_files
from melprobe.hooks.lora import adapter_sizes
from melprobe.judging.evidence import make, needed
from melprobe.judging.judge import Judge
from melprobe.judging.question import Question, differences_in_training, digest, read_study
from melprobe.listener import load
from melprobe.model.checkpoint import read_config
from melprobe.report.notation import listing
from melprobe.report.verdict import one_page
from melprobe.store import check_same, provenance

SCHEMA = 1


def main(argv: Sequence[str] | None = None) -> None:
    """Check the pair, make the evidence, judge."""
    words = list(sys.argv[1:] if argv is None else argv)
    p = Parser(prog="python -m melprobe.verdict", description=__doc__)
    p.add_argument("study", type=Path, metavar="STUDY.yaml", help="such as recipes/verdicts/…")
    p.add_argument("--out", type=Path, help="folder of the result; by default under reports/")
    p.add_argument("--jobs", type=int, default=1, help="commands at a time; two suit two cores")
    options = p.parse_args(words)
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: take 1 or more")
    question = Question(read_study(options.study))
    asked = question.asked()
    n_layers = _check_models(question)
    unlike = differences_in_training(question.arms) if len(question.arms) > 1 else []
    out = options.out or Path("reports") / f"verdict-{options.study.stem}"
    check_writable(out, f"--out {out}")
    with held(out):
        _keep_asked(asked, out)
        stages = needed(question, out, n_layers)
        console = Console(stderr=True)
        console.print(f"margins and runs as of sha256 {digest(asked)[:12]}", soft_wrap=True)
        make(stages, lambda one: console.print(one.command, soft_wrap=True), options.jobs)
        verdict = {
            "schema": SCHEMA,
            "asked": {"sha256": digest(asked), **asked},
            **Judge(question, out, n_layers).verdict(),
            "training_differs_in": unlike,
            "evidence": [one.command for stage in stages for one in stage],
            **provenance(
                seed=question.file.seed,
                command=["python -m melprobe.verdict", *map(shlex.quote, words)],
            ),
        }
        for runs in (verdict["arms"], verdict["nearest_wer"]):
            for name, described in runs.items():
                of_arm = (question.arms if runs is verdict["arms"] else question.nearest)[name]
                for one, its in zip(of_arm, described, strict=True):
                    model = load(one.folder, device="cpu", merge=False).model
                    its["adapter_sizes"] = [round(x, 4) for x in adapter_sizes(model)]

        def write(folder: Path) -> None:
            text = json.dumps(verdict, indent=1, ensure_ascii=False, allow_nan=False)
            (folder / "verdict.json").write_text(text + "\n", encoding="utf-8")
            (folder / "verdict.svg").write_text(one_page(verdict), encoding="utf-8")

        replace_files(out, write)
    show(verdict, Console())
    print(f"verdict: {out / 'verdict.json'}")


def _check_models(question: Question) -> int:
    """How many blocks all have; UsageError unless they stand over one base."""
    configs = [read_config(run.folder) for run in question.runs]
    for config in configs[1:]:
        check_pair(configs[0], config)
    return configs[0].text_config.num_hidden_layers


def _keep_asked(asked: dict[str, Any], out: Path) -> None:
    """What is asked, kept before there are rows; UsageError where `out` has another question's."""
    path = out / "asked.json"
    if path.exists():
        as_json = [
            {key: json.dumps(value, sort_keys=True) for key, value in one.items()}
            for one in (json.loads(path.read_text()), asked)
        ]
        check_same(out, *as_json)
    path.write_text(json.dumps(asked, indent=1) + "\n")


def show(verdict: dict[str, Any], console: Console) -> None:
    """A row for each block."""
    if not verdict["gates_passed"]:
        console.print("Listening gate NOT passed by all: nothing is claimed of layers.")
    arms = list(verdict["arms"])
    table = Table("block", *(f"need, {arm}" for arm in arms), box=None)
    if len(arms) > 1:
        table.add_column("agreement")
        table.add_column("at equal computing")
    for layer in verdict["layers"]:
        if not layer["judged"]:
            table.add_row(str(layer["layer"]), "zero by construction")
            continue
        cells = [layer["need"][arm]["need"] for arm in arms]
        if agreement := layer["agreement"]:
            cells += [agreement["agreement"], agreement["at_equal_computing"]]
        table.add_row(str(layer["layer"]), *cells)
    console.print(table)
    for arm, found in verdict["top_quarter"].items():
        blocks = listing([str(block) for block in found["blocks"]])
        console.print(
            f"{arm}: the top quarter ({blocks}) is not needed for speech, and the rest is: "
            f"{found['verdict']}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    run(main, resumable=True)
