"""`python -m melprobe.ablate --skip-layers`: which blocks does listening need?

Cuts each decoder block in turn (or one set of blocks) at the speech positions, measures what that
costs, and writes a report. A block does two things for a position: it works on what stands there,
and lets other positions read it. --skip-layers takes the first away, --knockout the second,
--bypass-layers both. --ablate-attention, --ablate-mlp and --ablate-heads take one part of the work.
--patch puts in what enters the block when the model hears something else: from which block on is
nothing read there any more? --without-lora leaves the block and takes away what speech training
changed in it. --copy-text is the control: the clips' words stand in their place, to be copied.
Stopped and started again, a study goes on where it was.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile
from rich.console import Console
from rich.progress import Progress

from melprobe.analysis.choice import choose_sets, halves
from melprobe.analysis.findings import describe_data, layer_findings
from melprobe.analysis.healing import add_healed_rows, describe_healing, heal, healing_recipe
from melprobe.analysis.protocol import (
    answer_limit,
    choose,
    leave_out_too_long,
    noisy,
    of_length,
    worded,
)
from melprobe.analysis.question import Question, asked
from melprobe.analysis.study import LayerStudy, swap_partners
from melprobe.analysis.sweep import run_layer_study
from melprobe.audio.load import SAMPLE_RATE, load_usable
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.hooks.positions import POSITIONS
from melprobe.listener import DTYPES, Listener, load
from melprobe.model.checkpoint import DEFAULT
from melprobe.model.memory import default_budget_mb
from melprobe.model.prompts import Given
from melprobe.report.examples import chosen_utterances, clip_path
from melprobe.report.html import render
from melprobe.report.reading import EACH_BLOCK
from melprobe.report.schema import CutName
from melprobe.store import RowStore
from melprobe.subject import Subject, find_subject
from melprobe.wheels import file_sha256

_SETS = (
    "each block in turn, or the set given, such as 3,5-8 (counted from 0), or sets in turn: "
    "windows:N (neighbours), prefixes, suffixes, greedy (the least harmful block next, until the "
    "margin is passed), picks:N (the N that greedy and beam search, angular distance and block "
    "influence choose)"
)
CUTS: dict[str, tuple[CutName, str]] = {
    "--skip-layers": ("skip", f"skip {_SETS}"),
    "--knockout": ("knock-out", f"knock out {_SETS}"),
    "--bypass-layers": ("bypass", f"bypass {_SETS}"),
    "--ablate-attention": ("no-attention", f"take attention out of {_SETS}"),
    "--ablate-mlp": ("no-mlp", f"take the MLP out of {_SETS}"),
    "--ablate-heads": ("no-head", "take out each attention head in turn, of all or some blocks"),
    "--patch": ("patch", f"put another run's residual into {_SETS}"),
    "--without-lora": ("without-lora", f"switch LoRA off in {_SETS}"),
}


def parser() -> Parser:
    p = Parser(prog="python -m melprobe.ablate", description=__doc__)
    cuts = p.add_mutually_exclusive_group(required=True)
    for option, (_, what) in CUTS.items():
        cuts.add_argument(option, nargs="?", const=EACH_BLOCK, metavar="LAYERS", help=what)
    p.add_argument(
        "--positions",
        help=f"one of {', '.join(POSITIONS)}, or seconds of speech such as speech:0.5-1.2 "
        "(default: speech; with --without-lora all, with --copy-text prompt)",
    )
    p.add_argument(
        "--by",
        metavar="WHAT",
        help="with --ablate-...: what stands in its place: zero (the default), mean (over the "
        "clips) or resample (what it is for another clip); with --patch: the run it comes from, "
        "resample (another clip, the default) or noise:DB (the same clip in noise DB below it)",
    )
    p.add_argument(
        "--readers",
        metavar="POSITIONS",
        help="with --knockout: the positions that are not to read (default: all others)",
    )
    p.add_argument(
        "--beyond",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="with --knockout --readers speech: hide only what sounds so much earlier",
    )
    p.add_argument(
        "--heal",
        type=int,
        metavar="STEPS",
        help="with --skip-layers and a set: train LoRA and front with it skipped, for so many "
        "steps on the checkpoint's own data, and measure again",
    )
    p.add_argument(
        "--copy-text",
        action="store_true",
        help="give the model each clip's words as text instead, to be copied",
    )
    p.add_argument("--checkpoint", help=f"name under checkpoints/, or a folder ({DEFAULT})")
    p.add_argument(
        "--model",
        metavar="HUB_ID",
        help="someone else's speech LLM instead, by hub id or folder, or with --copy-text a plain "
        "language model, such as smollm2-135m or mini-base; see docs/other-models.md",
    )
    p.add_argument("--device-map", help="with --model: spread it, as transformers does (auto)")
    p.add_argument("--data", default="builtin/test", help="manifest, or name like queen/test")
    p.add_argument("--lengths", metavar="A-B", help="only clips that last A to B seconds")
    p.add_argument(
        "--noise", type=float, metavar="DB", help="add noise, each of its colour, DB below a clip"
    )
    p.add_argument("--limit", type=int, default=30, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0, help="chooses the utterances and resamples them")
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--dtype", choices=DTYPES, help="by default what the device multiplies fast")
    p.add_argument(
        "--memory",
        type=int,
        metavar="MB",
        help="for what batches hold, beside the weights (2000; on a GPU half of what is free)",
    )
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    p.add_argument("--out", type=Path, help="folder of the run; by default under reports/")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and render its report."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    question = asked(options, {option: cut for option, (cut, _) in CUTS.items()})
    subject = find_subject(options)
    out = options.out or default_out(options, question, subject.name)
    check_writable(out, f"--out {out}")
    manifest = find_manifest(options.data)
    listener, study, left_out = prepare(options, question, subject, manifest, out)
    settings = {
        "run": study.run,
        "checkpoint": subject.fingerprint(),
        "data": file_sha256(manifest),
        "utterances": [u.id for u in study.utterances],
        **question._asdict(),
        "noise_db": options.noise,
        "seed": options.seed,
        "max_new_tokens": study.max_new_tokens,
        "heal": options.heal,
        "dtype": str(listener.model.dtype),
        "device": listener.model.device.type,
    }
    chosen = None
    with RowStore(out / "rows.sqlite", settings) as store:
        with Progress(console=Console(stderr=True)) as progress:
            if question.chooses:
                bar = progress.add_task("choosing blocks", total=None)
                chosen = choose_sets(listener, study, store, partial(progress.advance, bar))
                study = chosen.study
                progress.update(bar, total=chosen.n_tried, completed=chosen.n_tried)
            rows_due = len(study.utterances) * (2 + len(study.targets))
            bar = progress.add_task("cutting", total=rows_due)
            run_layer_study(listener, study, store, partial(progress.advance, bar))
        if options.heal is not None:
            folder = heal(subject, study, options.heal, out / "healing", listener.model.device)
            healed = load(folder, device=options.device, dtype=listener.model.dtype)
            add_healed_rows(listener, healed, study, store)
        store.export_parquet(out / "rows.parquet")
        rows = store.frame()
    results = layer_findings(
        rows,
        study,
        chosen,
        checkpoint=subject.describe(listener),
        data=describe_data(options.data, manifest, study, left_out, options.noise, options.lengths),
        unread=question.unread_block(listener.processor, listener.n_layers, study.given),
        healing=options.heal and describe_healing(out / "healing"),
        seed=options.seed,
        words=words,
    )
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not question.copy_text:
        keep_examples(out, rows, study)
    print(f"report: {render(out)}")


def prepare(
    options: Any, question: Question, subject: Subject, manifest: Path, out: Path
) -> tuple[Listener, LayerStudy, list[str]]:
    """The model, the study, and a line for each clip that was left out; UsageError for all that

    can be refused before the model has run.
    """
    if options.memory is not None and options.memory < 1:
        raise UsageError(f"--memory {options.memory}: give megabytes, such as 2000")
    targets = question.targets(subject.n_layers, subject.n_heads, subject.with_lora)
    if options.heal is not None:
        if question.cut != "skip" or len(targets) != 1 or question.chooses:
            raise UsageError("--heal goes with --skip-layers and one set of blocks, such as 25-28")
        healing_recipe(subject, options.heal, out / "healing")
    listed = of_length(read_manifest(manifest), options.lengths)
    drawn = choose(listed, options.limit, options.seed)
    given: list[Given]
    if question.copy_text:
        usable, texts, left_out = worded(drawn)
        given = [*texts]
    else:
        usable, waves, left_out = load_usable(drawn, options.on_bad_audio)
        if options.noise is not None:
            waves = noisy(waves, options.noise, options.seed)
        given = [*waves]
    listener = subject.load(options, question.cut != "without-lora")
    if question.copy_text:
        listener = listener.reading()
    for place in reversed(question.without_patches(usable, given, listener.processor)):
        left_out.append(f"{usable[place].id}: nothing of it stands at {question.positions}")
        del usable[place], given[place]
    left_out += leave_out_too_long(listener, usable, given, options.on_bad_audio)
    question.check(listener.processor)
    if question.chooses:
        halves(len(usable))
    study = LayerStudy(
        run=out.resolve().name,
        utterances=usable,
        given=given,
        partners=swap_partners(usable),
        question=question,
        targets=targets,
        max_new_tokens=answer_limit(listener, usable),
        memory_mb=options.memory or default_budget_mb(listener.model),
    )
    study.batches(listener)  # a clip that doesn't fit is refused before any has run
    return listener, study, left_out


def default_out(options: Any, question: Question, name: str) -> Path:
    """A folder under reports/ that the same command finds again."""
    layers = "" if question.layers == EACH_BLOCK else f"-layers-{question.layers}"
    data = options.data.removesuffix(".jsonl").replace("/", "-").strip("-.")
    data += f"-{options.lengths}s" if options.lengths else ""
    data += f"-noise{options.noise:g}dB" if options.noise is not None else ""
    seed = f"-seed{options.seed}" if options.seed else ""
    layers += f"-healed-{options.heal}" if options.heal is not None else ""
    data += "-copy-text" if question.copy_text else ""
    hidden = f"-from-{question.readers}" if question.readers else ""
    hidden += f"-beyond-{question.beyond:g}" if question.beyond else ""
    by = f"-{options.by}" if options.by not in (None, "zero") else ""
    how = f"{question.cut}{by}-{question.positions}{hidden}{layers}-n{options.limit}{seed}".replace(
        ":", "-"
    )
    return Path("reports") / f"{name}-{data}-{how}"


def keep_examples(out: Path, rows: pd.DataFrame, study: LayerStudy) -> None:
    """Put a few clips beside the rows, so that the report can be rebuilt from its folder alone."""
    (out / "audio").mkdir(exist_ok=True)
    wave_of = {u.id: wave for u, wave in zip(study.utterances, study.given, strict=True)}
    for utterance in chosen_utterances(rows):
        soundfile.write(clip_path(out, utterance), wave_of[utterance], SAMPLE_RATE)


if __name__ == "__main__":
    run(main, resumable=True)
