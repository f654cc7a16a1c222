"""`python -m melprobe.prune --layers 25-28 --out DIR`: a model without these blocks, and its price.

Or `--speech-exit 14`: a model whose speech leaves it after block 14, while prompt and answer go
through all blocks. That is what skipping the blocks above at the speech positions computes, for
less work; blocks that are taken out are gone at every position, and cost more.

Writes the model whole (LoRA folded in), as any transformers model, with `prune.json` beside it:
WER, speed and size before and after on the same clips.
"""

import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from melprobe.analysis.findings import targets_after
from melprobe.analysis.protocol import answer_limit, choose, leave_out_too_long
from melprobe.analysis.statistics import Bootstrap
from melprobe.analysis.wer import WordErrors
from melprobe.audio.load import load_usable
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.evaluation.rows import Batched, make_rows, row_errors, score
from melprobe.folders import replace_folder
from melprobe.hooks.layers import decoder_blocks, format_layers, parse_layers
from melprobe.listener import DTYPES, Listener, load
from melprobe.model import checkpoint
from melprobe.model.ancestry import ANCESTORS
from melprobe.model.checkpoint import DEFAULT, find_checkpoint
from melprobe.model.inference import batches_by_length
from melprobe.model.memory import peak_bytes
from melprobe.model.processor import MelLLMProcessor
from melprobe.model.prune import check_droppable, check_exitable, drop_blocks, let_speech_exit

BATCH_SECONDS = 80.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, prune, measure again, save."""
    p = Parser(prog="python -m melprobe.prune", description=__doc__)
    ways = p.add_mutually_exclusive_group(required=True)
    ways.add_argument("--layers", help="blocks to take out, such as 3,5-8")
    ways.add_argument(
        "--speech-exit", type=int, metavar="BLOCK", help="last block that works on speech"
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the new model")
    p.add_argument("--checkpoint", default=DEFAULT, help="name under checkpoints/, or a folder")
    p.add_argument("--data", default="builtin/test", help="manifest, or name like queen/test")
    p.add_argument("--limit", type=int, default=0, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--dtype", choices=DTYPES, help="by default what the device multiplies fast")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    options = p.parse_args(argv)
    folder = find_checkpoint(options.checkpoint)
    check_writable(options.out, f"--out {options.out}")
    if options.out.exists() and any(options.out.iterdir()):
        raise UsageError(f"--out {options.out}: not empty; take another folder")
    drawn = choose(read_manifest(find_manifest(options.data)), options.limit, options.seed)
    usable, waves, left_out = load_usable(drawn, options.on_bad_audio)
    listener = load(folder, device=options.device, dtype=DTYPES.get(options.dtype))
    change = planned(listener, targets_after(folder), options.layers, options.speech_exit)
    left_out += leave_out_too_long(listener, usable, waves, options.on_bad_audio)
    limit = answer_limit(listener, usable)  # the same for both
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("listening", total=2 * len(usable))
        listen = partial(
            measure, listener, usable, waves, limit, lambda n: progress.advance(bar, n)
        )
        before, errors_before = listen(options.seed)
        change.make()
        after, errors_after = listen(options.seed)
    paired = Bootstrap([u.speaker for u in usable], seed=options.seed).ratio(
        [new.total - old.total for old, new in zip(errors_before, errors_after, strict=True)],
        [old.reference_words for old in errors_before],
    )
    disable_progress_bar()
    processor = cast(MelLLMProcessor, listener.processor)
    found = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        **change.told,
        "before": before,
        "after": after,
        "delta_wer": paired.value,
        "delta_wer_ci": [paired.low, paired.high] if math.isfinite(paired.high) else None,
        "left_out": left_out,
    }

    def write(out: Path) -> None:
        checkpoint.save(listener.model, processor, out, listener.model.dtype)
        for name in ("data.json", ANCESTORS):
            if (folder / name).exists():
                shutil.copy(folder / name, out)
        (out / "prune.json").write_text(json.dumps(found, indent=2) + "\n")

    replace_folder(options.out, write)
    print(json.dumps(found, indent=2))


class Change(NamedTuple):
    """What is done to a model."""

    make: Callable[[], None]
    """Does it, in place."""
    told: dict[str, Any]
    """What prune.json says of it. A report on the model must still say where its training told it
    to listen: `targets_after`."""


def planned(
    listener: Listener, targets: Sequence[int], layers: str | None, speech_exit: int | None
) -> Change:
    """One of the two; UsageError for what can't be done."""
    model = listener.model
    if speech_exit is not None:
        check_exitable(model, speech_exit)
        told = {"speech_exit": speech_exit, "targets_after": sorted(targets)}
        return Change(partial(let_speech_exit, model, speech_exit), told)
    gone = parse_layers(layers or "", listener.n_layers)
    kept = check_droppable(model, gone)
    moved = {max(0, bisect_right(kept, block) - 1) for block in targets}
    told = {"blocks_taken_out": format_layers(gone), "targets_after": sorted(moved)}
    return Change(partial(drop_blocks, model, gone), told)


def measure(
    listener: Listener,
    usable: list[Utterance],
    waves: list[np.ndarray],
    limit: int,
    advance: Callable[[int], None],
    seed: int,
) -> tuple[dict[str, Any], list[WordErrors]]:
    """Size, speed and scores of the model as it is, and the errors in each clip.

    `seconds` is all listening, `prefill_seconds` the same clips as far as each answer's first
    token (features, prompt, one token), the best of three since it is short.
    """

    def hear(tokens: int, advance: Callable[[int], None]) -> Batched:
        return Batched(lambda batch: listener.transcribe(batch, tokens), BATCH_SECONDS, advance)

    whole, prefill = hear(limit, advance), hear(1, lambda n: None)
    longest = next(batches_by_length([len(wave) for wave in waves], whole.most))
    # Also a warm-up: the first pass is slower than the others.
    found = size(listener, lambda: whole.transcriber([waves[i] for i in longest]))
    rows = make_rows(usable, waves, *whole(waves))
    found["seconds"] = sum(row["time"] for row in rows)
    found["prefill_seconds"] = min(sum(prefill(waves)[1]) for _ in range(3))
    scores = score(rows, [u.speaker for u in usable], seed)
    return {**found, **scores}, [row_errors(row) for row in rows]


def size(listener: Listener, work: Callable[[], object]) -> dict[str, Any]:
    """Blocks, weights, and what tensors took at most during `work`, weights among them."""
    model = listener.model
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        work()
        peak = torch.cuda.max_memory_allocated(model.device)
    else:
        peak = peak_bytes(model, work)
    return {
        "blocks": len(decoder_blocks(model)),
        "weights_mb": round(sum(p.nbytes for p in model.parameters()) / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
    }


if __name__ == "__main__":
    run(main)
