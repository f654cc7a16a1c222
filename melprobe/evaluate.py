"""`python -m melprobe.evaluate MANIFEST`: word error rate with its interval, and two controls.

Rows first (JSON lines, the fields of the Open ASR Leaderboard), scores from the rows. Beside the
WER stand the WER when each clip's audio is swapped for another's (a model that hears should fail
there) and the WER of answering with the nearest training transcript (what memory alone could do,
choosing with the reference in hand). `--versus` adds another model on the same clips; `--suite
open-asr` takes the leaderboard's sets in place of a manifest.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from melprobe.analysis.protocol import choose
from melprobe.analysis.wer import corpus_wer, normalise
from melprobe.audio.load import load_usable
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.evaluation import suite, versus
from melprobe.evaluation.controls import (
    nearest_wer,
    partners_or_none,
    swapped_rows,
    training_texts,
)
from melprobe.evaluation.hearing import leave_out_unheard, open_listener, transcriber
from melprobe.evaluation.open_asr import GENERATIONS, LATEST
from melprobe.evaluation.rows import (
    Batched,
    by_speaker,
    make_rows,
    row_errors,
    score,
    write_rows,
)
from melprobe.model.checkpoint import DEFAULT, find_checkpoint
from melprobe.model.whisper import JUDGE


def main(argv: Sequence[str] | None = None) -> None:
    """Transcribe a manifest or a suite, write the rows, print the scores."""
    p = Parser(prog="python -m melprobe.evaluate", description=__doc__)
    p.add_argument("manifest", nargs="?", help="path, or name like builtin/test")
    p.add_argument("--suite", choices=("open-asr",), help="the leaderboard's sets, and ours")
    p.add_argument(
        "--generation", choices=GENERATIONS, help=f"the suite's sets of that year ({LATEST})"
    )
    p.add_argument(
        "--checkpoint", default=DEFAULT, help=f"name or folder, or {JUDGE} as the ceiling"
    )
    p.add_argument(
        "--versus", metavar="OTHER", help="another checkpoint, or an earlier --out with its rows"
    )
    p.add_argument("--limit", type=int, default=0, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--batch-seconds", type=float, default=80.0, help="padded audio in a batch")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    p.add_argument("--out", type=Path, help="folder for rows*.jsonl and summary.json")
    options = p.parse_args(argv)
    if not 0 < options.batch_seconds < math.inf:
        raise UsageError(f"--batch-seconds {options.batch_seconds}: take a number above 0")
    if options.suite:
        if options.manifest:
            raise UsageError(f"--suite has sets of its own; leave {options.manifest} out")
        if options.versus:
            raise UsageError("--versus compares on a manifest; leave --suite out, or --versus")
    elif options.generation:
        raise UsageError("--generation is of a suite; add --suite open-asr")
    elif not options.manifest:
        raise UsageError("name a manifest, such as builtin/test, or give --suite open-asr")
    if options.out:
        check_writable(options.out, f"--out {options.out}")
    if options.suite:
        suite.evaluate(options)
    else:
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """One manifest: rows, controls, and another model beside it if there is `--versus`."""
    if options.out:
        _refuse_other_results(options.out, options.manifest, options.checkpoint)
    other, earlier = options.versus, None
    if other and versus.is_earlier(other):
        other, earlier = versus.read_earlier(Path(other), options.manifest)
    if other:
        versus.refuse_same(options.checkpoint, other)
    chosen = choose(read_manifest(find_manifest(options.manifest)), options.limit, options.seed)
    usable, waves, left_out = load_usable(chosen, options.on_bad_audio)
    listener = open_listener(options.checkpoint, options.device)
    models = [listener]
    if other and earlier is None:
        models.append(open_listener(other, options.device))
    for model in models:
        left_out += leave_out_unheard(model, usable, waves, options.on_bad_audio)
    if not any(normalise(u.text) for u in usable):
        raise UsageError("the references hold no words, so there is no word error rate")
    if earlier:
        versus.check_same_clips(options.versus, earlier, usable)
    # Nobody doubts that the ceiling hears, and it is slow.
    partners = partners_or_none(usable) if listener else None
    with Progress(console=Console(stderr=True)) as progress:
        times = len(models) + bool(partners)
        bar = progress.add_task("listening", total=len(usable) * times)
        batched, *rival = [
            Batched(
                transcriber(model, usable, options.device),
                options.batch_seconds,
                lambda n: progress.advance(bar, n),
            )
            for model in models
        ]
        rows = make_rows(usable, waves, *batched(waves))
        swapped = swapped_rows(usable, waves, partners, batched) if partners else None
        others = make_rows(usable, waves, *rival[0](waves)) if rival else earlier
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_rows(options.out / "rows.jsonl", rows)
        write_rows(options.out / "rows_swapped.jsonl", swapped or [])
        (options.out / "rows_versus.jsonl").unlink(missing_ok=True)
        if others:
            write_rows(options.out / "rows_versus.jsonl", others)
    speakers = [u.speaker for u in usable]
    summary: dict[str, Any] = {
        "manifest": options.manifest,
        "checkpoint": options.checkpoint,
        **score(rows, speakers, options.seed),
        "wer_swapped": swapped and corpus_wer(map(row_errors, swapped)),
        "left_out": left_out,
    }
    if options.checkpoint != JUDGE:
        texts = training_texts(find_checkpoint(options.checkpoint))
        nearest = nearest_wer(usable, texts) if texts else None
        summary["wer_nearest_training_transcript"] = nearest
    if others:
        names = (options.checkpoint, other)
        summary["versus"] = versus.compare(names, (rows, others), speakers, options.seed)
    if options.out:
        voices = by_speaker([row_errors(row) for row in rows], speakers)
        filed = json.dumps(summary | {"by_speaker": voices}, indent=2)
        (options.out / "summary.json").write_text(filed + "\n")
    print(json.dumps(summary, indent=2))


def _refuse_other_results(out: Path, manifest: str, checkpoint: str) -> None:
    """A folder belongs to one checkpoint and one manifest."""
    path = out / "summary.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_bytes())
        there = (old["checkpoint"], old.get("manifest") or f"--suite {old['suite']}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: not a summary of evaluate's; take another --out") from None
    if there != (checkpoint, manifest):
        has = f"{there[0]} on {there[1]}"
        raise UsageError(f"--out {out}: holds the results of {has}; take another --out")


if __name__ == "__main__":
    run(main, resumable={"--suite", "--out"} <= set(sys.argv))
