"""`python -m melprobe.prune --layers 25-28 --out DIR`: a model without these blocks, and its price.

Writes the model whole (LoRA folded in), as any transformers model, with `prune.json` beside it:
WER, speed and size before and after on the same clips. The blocks are gone at every position, so
this costs more than skipping them at the speech positions alone.
"""

import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from melprobe.analysis.findings import targets_after
from melprobe.analysis.protocol import choose, leave_out_too_long
from melprobe.analysis.statistics import Bootstrap
from melprobe.audio.load import load_usable
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.evaluate import Batched, make_rows, own, row_errors, score
from melprobe.hooks.layers import decoder_blocks, format_layers, parse_layers
from melprobe.listener import DTYPES, Listener, load
from melprobe.model import checkpoint
from melprobe.model.checkpoint import DEFAULT, find_checkpoint
from melprobe.model.processor import MelLLMProcessor
from melprobe.model.prune import check_droppable, drop_blocks


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, take the blocks out, measure again, save."""
    p = Parser(prog="python -m melprobe.prune", description=__doc__)
    p.add_argument("--layers", required=True, help="blocks to take out, such as 3,5-8")
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
    gone = parse_layers(options.layers, listener.n_layers)
    kept = check_droppable(listener.model, gone)
    left_out += leave_out_too_long(listener, usable, waves, options.on_bad_audio)
    transcriber = own(listener, usable)  # the same limit for both
    measured, errors = [], []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("listening", total=2 * len(usable))
        for blocks in ((), gone):
            if blocks:
                drop_blocks(listener.model, blocks)
            transcriber(waves[:1])  # the first pass is slower than the others
            if listener.model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(listener.model.device)
            batched = Batched(transcriber, 80.0, lambda n: progress.advance(bar, n))
            rows = make_rows(usable, waves, *batched(waves))
            scores = score(rows, [u.speaker for u in usable], options.seed)
            measured.append({**size(listener), **scores})
            errors.append([row_errors(row) for row in rows])
    paired = Bootstrap([u.speaker for u in usable], seed=options.seed).ratio(
        [after.total - before.total for before, after in zip(*errors, strict=True)],
        [before.reference_words for before in errors[0]],
    )
    disable_progress_bar()
    processor = cast(MelLLMProcessor, listener.processor)
    checkpoint.save(listener.model, processor, options.out, listener.model.dtype)
    found = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "blocks_taken_out": format_layers(gone),
        # A report on the model must still say where its training told it to listen.
        "targets_after": sorted(
            {max(0, bisect_right(kept, block) - 1) for block in targets_after(folder)}
        ),
        "before": measured[0],
        "after": measured[1],
        "delta_wer": paired.value,
        "delta_wer_ci": [paired.low, paired.high] if math.isfinite(paired.high) else None,
        "left_out": left_out,
    }
    if (folder / "data.json").exists():
        shutil.copy(folder / "data.json", options.out)
    (options.out / "prune.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def size(listener: Listener) -> dict[str, Any]:
    """Blocks, weights, and what was allocated on a GPU at most while listening."""
    model = listener.model
    found: dict[str, Any] = {
        "blocks": len(decoder_blocks(model)),
        "weights_mb": round(sum(p.nbytes for p in model.parameters()) / 1e6, 1),
    }
    if model.device.type == "cuda":
        found["peak_mb"] = round(torch.cuda.max_memory_allocated(model.device) / 1e6)
    return found


if __name__ == "__main__":
    run(main)
