"""Transcribing the clips that a study's arms are scored on; a process of its own for each arm."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from melprobe.audio.load import load_usable
from melprobe.errors import run
from melprobe.evaluation.hearing import transcriber
from melprobe.evaluation.rows import Batched, make_rows, write_rows
from melprobe.hooks.layers import parse_layers
from melprobe.listener import load
from melprobe.studies.sizes import Test

_BATCH_SECONDS = 80.0


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row a clip, in `evaluate`'s fields and with its speaker."""
    p = argparse.ArgumentParser(prog="python -m melprobe.studies.testing", description=__doc__)
    p.add_argument("--manifest", required=True)
    p.add_argument("--clips", type=int, required=True)
    p.add_argument("--max-seconds", type=float)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--without-lora", metavar="LAYERS")
    p.add_argument("--rows", type=Path, required=True)
    options = p.parse_args(argv)
    test = Test(manifest=options.manifest, clips=options.clips, max_seconds=options.max_seconds)
    usable, waves, _ = load_usable(test.drawn(), "error")
    lm = load(options.checkpoint, merge=not options.without_lora)
    batched = Batched(transcriber(lm, usable, None), _BATCH_SECONDS, lambda n: None)
    off = parse_layers(options.without_lora, lm.n_layers) if options.without_lora else []
    cut: AbstractContextManager[None] = lm.without_lora(off) if off else nullcontext()
    with cut:
        rows = make_rows(usable, waves, *batched(waves))
    for row, u in zip(rows, usable, strict=True):
        row["speaker"] = u.speaker
    draft = options.rows.with_suffix(".part")
    write_rows(draft, rows)
    draft.replace(options.rows)


if __name__ == "__main__":
    run(main)
