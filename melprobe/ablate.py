"""`python -m melprobe.ablate --skip-layers`: which blocks does listening need?

Cuts each decoder block in turn (or one set of blocks) at the speech positions, measures what that
costs, and writes a report. A block does two things for a position: it works on what stands there,
and lets other positions read it. --skip-layers takes the first away, --knockout the second,
--bypass-layers both. --ablate-attention and --ablate-mlp take one part of the work. --without-lora
leaves the block and takes away what speech training changed in it. Stopped and started again, a
study goes on where it was.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile
from rich.console import Console
from rich.progress import Progress

from melprobe.analysis.choice import Picked, choose_sets, halves
from melprobe.analysis.damage import score_layers
from melprobe.analysis.protocol import answer_limit, choose, leave_out_too_long
from melprobe.analysis.question import CutName, Question, asked
from melprobe.analysis.sweep import LayerStudy, run_layer_study, swap_partners
from melprobe.audio.load import SAMPLE_RATE, load_usable
from melprobe.audio.patches import patch_rate
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, check_writable, run
from melprobe.hooks.layers import format_layers
from melprobe.hooks.positions import POSITIONS
from melprobe.listener import DTYPES, Listener, load
from melprobe.model.checkpoint import (
    DEFAULT,
    find_checkpoint,
    lora_blocks,
    read_config,
    weights_file,
)
from melprobe.report import reading
from melprobe.report.examples import chosen_utterances, clip_path
from melprobe.report.html import render
from melprobe.report.reading import EACH_BLOCK
from melprobe.report.schema import SCHEMA
from melprobe.store import RowStore, provenance
from melprobe.wheels import file_sha256

ENOUGH_FOR_WER = 120  # simulated: LOG.md, "Intervals"
CUTS: dict[str, tuple[CutName, str]] = {
    "--skip-layers": ("skip", "skip"),
    "--knockout": ("knock-out", "knock out"),
    "--bypass-layers": ("bypass", "bypass"),
    "--ablate-attention": ("no-attention", "take attention out of"),
    "--ablate-mlp": ("no-mlp", "take the MLP out of"),
    "--without-lora": ("without-lora", "switch LoRA off in"),
}


def parser() -> Parser:
    p = Parser(prog="python -m melprobe.ablate", description=__doc__)
    cuts = p.add_mutually_exclusive_group(required=True)
    for option, (_, verb) in CUTS.items():
        cuts.add_argument(
            option,
            nargs="?",
            const=EACH_BLOCK,
            metavar="LAYERS",
            help=f"{verb} each block in turn, or the set given, such as 3,5-8 (counted from 0), or "
            "sets in turn: windows:N (neighbours), prefixes, suffixes, greedy (the least harmful "
            "block next, until the margin is passed), picks:N (the N that greedy and beam search, "
            "angular distance and block influence choose)",
        )
    p.add_argument(
        "--positions",
        help=f"one of {', '.join(POSITIONS)}, or seconds of speech such as speech:0.5-1.2 "
        "(default: speech; with --without-lora all)",
    )
    p.add_argument(
        "--by",
        choices=("zero", "mean", "resample"),
        help="with --ablate-...: what stands in its place: nothing (the default), its mean over "
        "the clips, or what it is for another clip",
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
    p.add_argument("--checkpoint", default=DEFAULT, help="name under checkpoints/, or a folder")
    p.add_argument("--data", default="builtin/test", help="manifest, or name like queen/test")
    p.add_argument("--limit", type=int, default=30, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0, help="chooses the utterances and resamples them")
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--dtype", choices=DTYPES, help="by default what the device multiplies fast")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    p.add_argument("--out", type=Path, help="folder of the run; by default under reports/")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and render its report."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    question = asked(options, {option: cut for option, (cut, _) in CUTS.items()})
    checkpoint = find_checkpoint(options.checkpoint)
    out = options.out or default_out(options, question, checkpoint)
    check_writable(out, f"--out {out}")
    config = read_config(checkpoint)
    n_layers = config.text_config.num_hidden_layers
    sets = question.layer_sets(n_layers, lora_blocks(checkpoint, n_layers))
    manifest = find_manifest(options.data)
    chosen = choose(read_manifest(manifest), options.limit, options.seed)
    usable, waves, left_out = load_usable(chosen, options.on_bad_audio)
    for place in reversed(question.without_patches(usable, waves, config.frames_per_patch)):
        left_out.append(f"{usable[place].id}: nothing of it stands at {question.positions}")
        del usable[place], waves[place]
    listener = load(
        checkpoint,
        device=options.device,
        dtype=DTYPES.get(options.dtype),
        merge=question.cut != "without-lora",
    )
    left_out += leave_out_too_long(listener, usable, waves, options.on_bad_audio)
    deciding, reported = halves(len(usable)) if question.chooses else ([], [])
    question.check(listener.processor)
    study = LayerStudy(
        run=out.resolve().name,
        utterances=usable,
        waves=waves,
        partners=swap_partners(usable),
        question=question,
        layer_sets=sets,
        max_new_tokens=answer_limit(listener, usable),
    )
    settings = {
        "run": study.run,
        "checkpoint": file_sha256(weights_file(checkpoint)),
        "data": file_sha256(manifest),
        "utterances": [u.id for u in usable],
        "cut": question.cut,
        "layers": question.layers,
        "positions": question.positions,
        "readers": question.readers,
        "beyond": question.beyond,
        "by": question.by,
        "seed": options.seed,
        "max_new_tokens": study.max_new_tokens,
        "dtype": str(listener.model.dtype),
        "device": listener.model.device.type,
    }
    choice: dict[str, int] | None = None
    ways: dict[str, list[str]] = {}
    with RowStore(out / "rows.sqlite", settings) as store:
        with Progress(console=Console(stderr=True)) as progress:
            if question.chooses:
                picked = picked_sets(listener, study.of(deciding), store, progress)
                ways = {format_layers(layers): by for layers, by in picked}
                study = replace(study.of(reported), layer_sets=[layers for layers, _ in picked])
                choice = {"n_utterances": len(deciding), "sets_tried": len(store.tried())}
            bar = progress.add_task(
                reading.CUTS[question.cut].ing,
                total=len(study.utterances) * (2 + len(study.layer_sets)),
            )
            run_layer_study(listener, study, store, lambda n: progress.update(bar, advance=n))
        store.export_parquet(out / "rows.parquet")
        rows = store.frame()
    labels = [format_layers(layers) for layers in study.layer_sets]
    unread = question.unread_block(listener.processor, n_layers, study.waves)
    checkpoint_facts = describe_checkpoint(checkpoint, listener)
    n = len(study.utterances)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "run": study.run,
        "question": question._asdict(),
        "checkpoint": checkpoint_facts,
        "data": describe_data(options.data, manifest, study, left_out),
        "choice": choice,
        "n_utterances": n,
        **score_layers(rows, question.cut, labels, question.positions, unread, options.seed),
        **provenance(
            seed=options.seed, command=["python -m melprobe.ablate", *map(shlex.quote, words)]
        ),
        "warnings": warnings(n, checkpoint_facts["targets_after"]),
    }
    for layer, label in zip(results["layers"], labels, strict=True):
        layer["picked_by"] = ways.get(label, [])
    seconds = rows[rows.condition == "intact"].seconds.sum()
    results["baseline"]["rtfx"] = results["data"]["seconds"] / seconds
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    keep_examples(out, rows, study)
    print(f"report: {render(out)}")


def picked_sets(
    listener: Listener, study: LayerStudy, store: RowStore, progress: Progress
) -> list[Picked]:
    """The sets of blocks that the study's question asks for, chosen on its clips."""
    bar = progress.add_task("choosing blocks", total=None)
    blocks = [block for layers in study.layer_sets for block in layers]
    picked = choose_sets(listener, study, blocks, store, lambda n: progress.update(bar, advance=n))
    progress.update(bar, total=len(store.tried()), completed=len(store.tried()))
    return picked


def warnings(n: int, targets: Sequence[int]) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    if targets:
        blocks = f"block{'s' * (len(targets) > 1)} {reading.listing([str(b) for b in targets])}"
        found.append(
            f"Training read phones or words off the speech positions right after {blocks}, which "
            "draws hearing down to there. A profile that ends about there was asked for in "
            "training; it does not say where a model without such targets would listen."
        )
    if n < ENOUGH_FOR_WER:
        found.append(
            f"With {n} utterances the bands on ΔWER hold less often than 95 %, because few clips "
            "change their words: claims rest on ΔNLL."
        )
    return found


def default_out(options: Any, question: Question, checkpoint: Path) -> Path:
    """A folder under reports/ that the same command finds again."""
    layers = "" if question.layers == EACH_BLOCK else f"-layers-{question.layers}"
    data = options.data.removesuffix(".jsonl").replace("/", "-").strip("-.")
    seed = f"-seed{options.seed}" if options.seed else ""
    hidden = f"-from-{question.readers}" if question.readers else ""
    hidden += f"-beyond-{question.beyond:g}" if question.beyond else ""
    by = f"-{question.by}" if question.by not in ("", "zero") else ""
    how = f"{question.cut}{by}-{question.positions}{hidden}{layers}-n{options.limit}{seed}".replace(
        ":", "-"
    )
    return Path("reports") / f"{checkpoint_name(checkpoint)}-{data}-{how}"


def checkpoint_name(folder: Path) -> str:
    """The folder's name; a run's `best` and `last` say whose they are."""
    folder = folder.resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.name in {"best", "last"} else folder.name


def describe_checkpoint(folder: Path, listener: Listener) -> dict[str, Any]:
    data = folder / "data.json"
    manifests = json.loads(data.read_text())["manifests"] if data.exists() else []
    config = listener.model.config
    return {
        "name": checkpoint_name(folder),
        "sha256": file_sha256(weights_file(folder)),
        "base": config.base,
        "front": config.audio_front,
        "token_rate_hz": patch_rate(config.frames_per_patch),
        "n_layers": listener.n_layers,
        "trained_on": list(dict.fromkeys(corpus["manifest"] for corpus in manifests)),
        "targets_after": targets_after(folder),
        "dtype": str(listener.model.dtype).removeprefix("torch."),
    }


def targets_after(folder: Path) -> list[int]:
    """Blocks that training gave targets of their own, by all recipes that lie with a checkpoint."""
    blocks: set[int] = set()
    for path in folder.glob("recipe*.json"):
        recipe = json.loads(path.read_text())
        if frames := recipe.get("frames"):
            blocks |= {frames["phones_after"], frames["tokens_after"]}
        if ctc := recipe.get("ctc"):
            blocks.add(ctc["layer"])
    return sorted(blocks)


def describe_data(
    name: str, manifest: Path, study: LayerStudy, left_out: list[str]
) -> dict[str, Any]:
    n = len(study.utterances)
    speakers = {u.speaker for u in study.utterances if u.speaker}
    if len(speakers) == 1:
        scope = "one speaker: it can show what this model does with this voice, not with others"
    elif len(speakers) < 10:
        scope = f"{len(speakers) or 'unnamed'} speakers: too few to speak of speakers in general"
    else:
        scope = f"{len(speakers)} speakers, resampled whole: it speaks of speakers like these"
    return {
        "name": name,
        "n_utterances": n,
        "n_speakers": len(speakers),
        "seconds": round(sum(map(len, study.waves)) / SAMPLE_RATE, 2),
        "sha256": file_sha256(manifest),
        "note": f"{n} utterances of {scope}.",
        "left_out": left_out,
    }


def keep_examples(out: Path, rows: pd.DataFrame, study: LayerStudy) -> None:
    """Put a few clips beside the rows, so that the report can be rebuilt from its folder alone."""
    (out / "audio").mkdir(exist_ok=True)
    wave_of = {u.id: wave for u, wave in zip(study.utterances, study.waves, strict=True)}
    for utterance in chosen_utterances(rows):
        soundfile.write(clip_path(out, utterance), wave_of[utterance], SAMPLE_RATE)


if __name__ == "__main__":
    run(main, resumable=True)
