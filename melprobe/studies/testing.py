"""Transcribing the clips that a study's arms are scored on; a process of its own for each arm."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from melprobe.analysis.study import swap_partners
from melprobe.audio.load import SAMPLE_RATE, load_usable
from melprobe.corpus.manifest import Utterance
from melprobe.corpus.text import plain_text
from melprobe.errors import run
from melprobe.evaluation.hearing import transcriber
from melprobe.evaluation.rows import Batched, make_rows, write_rows
from melprobe.hooks.layers import parse_layers
from melprobe.listener import Listener, load
from melprobe.model.inference import batches_by_length
from melprobe.studies.sizes import Test

_BATCH_SECONDS = 80.0


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row a clip: `evaluate`'s fields, its speaker, and what the gate is made of."""
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
    partners = swap_partners(usable)
    with cut:
        rows = make_rows(usable, waves, *batched(waves))
        swapped, _ = batched([waves[i] for i in partners])
        scores = list(_scores(lm, usable, waves, partners))
    for row, u, heard, score in zip(rows, usable, swapped, scores, strict=True):
        row |= {"speaker": u.speaker, "pred_text_swapped": heard, **score}
    draft = options.rows.with_suffix(".part")
    write_rows(draft, rows)
    draft.replace(options.rows)


def _scores(
    lm: Listener, usable: Sequence[Utterance], waves: Sequence[np.ndarray], partners: Sequence[int]
) -> Iterator[dict[str, float]]:
    """What the gate is made of: each answer's tokens, and its nat under both clips."""
    found: dict[int, dict[str, float]] = {}
    seconds = [max(len(waves[i]), len(waves[j])) for i, j in enumerate(partners)]
    for batch in batches_by_length(seconds, int(_BATCH_SECONDS * SAMPLE_RATE)):
        texts = [plain_text(usable[i].text) for i in batch]
        own = lm.score([waves[i] for i in batch], texts)
        other = lm.score([waves[partners[i]] for i in batch], texts)
        columns = (own.tokens.tolist(), own.nll.tolist(), other.nll.tolist())
        for i, (tokens, nll, nll_swapped) in zip(batch, zip(*columns, strict=True), strict=True):
            found[i] = {"tokens": tokens, "nll": nll, "nll_swapped": nll_swapped}
    return (found[i] for i in range(len(waves)))


if __name__ == "__main__":
    run(main)
