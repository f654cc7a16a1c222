"""`python -m melprobe.capture --out DIR`: residuals of many clips on disk, for probes to read.

Every clip is heard once with its reference as the answer, and the residuals at the chosen positions
are written in shards; `melprobe.captured` says what is in the folder and reads it. --layers are
numbers of residuals: h_l enters block l, so 0 is what the audio front makes and the number of
blocks is what leaves the last one. Waves are loaded batch by batch, so memory does not grow with
the corpus. Stopped and started again, a capture goes on where it was.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import BatchFeature

from melprobe.analysis.findings import checkpoint_name
from melprobe.analysis.protocol import choose, leave_out_too_long, of_length
from melprobe.analysis.question import Question
from melprobe.audio.load import SAMPLE_RATE, load_usable, load_utterance
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.hooks.layers import format_layers, parse_residuals
from melprobe.hooks.positions import (
    POSITIONS,
    Kind,
    kinds_are,
    parse_positions,
    position_kinds,
)
from melprobe.listener import DTYPES, Listener, load
from melprobe.model.checkpoint import DEFAULT, find_checkpoint, read_config, weights_file
from melprobe.model.exit import check_residuals_reached
from melprobe.model.inference import batches_by_length
from melprobe.model.untrained import UNTRAINED, untrain
from melprobe.shards import CaptureWriter
from melprobe.store import provenance
from melprobe.wheels import file_sha256

WRITTEN = {**DTYPES, "float16": torch.float16}
BATCH_POSITIONS = 2048
"""Padded sequence positions in a batch: bounds memory."""


def parser() -> Parser:
    p = Parser(prog="python -m melprobe.capture", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder of the capture")
    p.add_argument(
        "--layers",
        default="all",
        metavar="RESIDUALS",
        help="numbers of residuals such as 0,7,14-20; h_l enters block l (default: all)",
    )
    p.add_argument(
        "--positions",
        default="speech",
        help=f"one of {', '.join(POSITIONS)}, or seconds of speech such as speech:0.5-1.2",
    )
    p.add_argument("--dtype", choices=WRITTEN, help="of what is written; by default the model's")
    p.add_argument(
        "--model-dtype", choices=DTYPES, help="by default what the device multiplies fast"
    )
    p.add_argument("--shard-mb", type=float, default=64.0, help="size of a file, in 10^6 bytes")
    p.add_argument("--checkpoint", default=DEFAULT, help="name under checkpoints/, or a folder")
    p.add_argument(
        "--untrained",
        choices=UNTRAINED,
        help="floors for probes: the base behind a projection drawn anew, or all weights anew",
    )
    p.add_argument("--data", default="builtin/test", help="manifest, or name like queen/test")
    p.add_argument("--lengths", metavar="A-B", help="only clips that last A to B seconds")
    p.add_argument("--limit", type=int, default=30, help="number of utterances (0: all)")
    p.add_argument("--seed", type=int, default=0, help="chooses the utterances")
    p.add_argument("--device", help="cpu, cuda or cuda:N; the best there is by default")
    p.add_argument("--on-bad-audio", choices=("error", "skip"), default="error")
    return p


class Wanted(NamedTuple):
    """What is to be captured."""

    numbers: list[int]
    """l of each h_l"""
    positions: str
    dtype: torch.dtype
    """of what is written"""


def main(argv: Sequence[str] | None = None) -> None:
    """Capture what was asked for, and print what was written."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    if not 0 < options.shard_mb < math.inf:
        raise UsageError(f"--shard-mb {options.shard_mb}: take a number above 0")
    checkpoint = find_checkpoint(options.checkpoint)
    config = read_config(checkpoint)
    numbers = parse_residuals(options.layers, config.text_config.num_hidden_layers)
    check_residuals_reached(config, numbers)
    parse_positions(options.positions)
    check_writable(options.out, f"--out {options.out}")
    manifest = find_manifest(options.data)
    listener, utterances, lengths, left_out = prepare(options, checkpoint, manifest)
    dtype = WRITTEN[options.dtype] if options.dtype else listener.model.dtype
    wanted = Wanted(numbers, options.positions, dtype)
    settings = {
        "checkpoint": file_sha256(weights_file(checkpoint)),
        "data": file_sha256(manifest),
        "utterances": sha256(json.dumps([u.id for u in utterances]).encode()).hexdigest(),
        "layers": format_layers(numbers),
        "positions": options.positions,
        "dtype": str(dtype).removeprefix("torch."),
        "model_dtype": str(listener.model.dtype).removeprefix("torch."),
        "shard_mb": options.shard_mb,
        "seed": options.seed,
        "device": listener.model.device.type,
        **({"untrained": options.untrained} if options.untrained else {}),
    }
    command = ["python -m melprobe.capture", *map(shlex.quote, words)]
    about = {
        "checkpoint": checkpoint_name(checkpoint),
        "data": options.data,
        "left_out": left_out,
        **describe(listener, numbers),
        **provenance(seed=options.seed, command=command),
    }
    writer = CaptureWriter(options.out, settings, about, records(utterances), options.shard_mb)
    start = time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress, writer:
        bar = progress.add_task("listening", total=len(utterances))
        heard = write(listener, utterances, lengths, wanted, writer, partial(progress.advance, bar))
    seconds = time.perf_counter() - start
    written = {
        "out": str(options.out),
        "utterances": len(utterances),
        **writer.size(),
        "seconds": round(seconds, 2),
        "rtfx": round(heard / seconds, 1) if heard else None,
        "left_out": left_out,
    }
    print(json.dumps(written, indent=2))


def prepare(
    options: Any, checkpoint: Path, manifest: Path
) -> tuple[Listener, list[Utterance], list[np.ndarray], list[str]]:
    """The model, what it is to hear, silence as long as each, a line for each that was left out.

    UsageError for all that can be refused before the model has run.
    """
    listed = of_length(read_manifest(manifest), options.lengths)
    drawn = choose(listed, options.limit, options.seed)
    usable, lengths, left_out = load_usable(drawn, options.on_bad_audio, load=_as_long)
    dtype, merge = DTYPES.get(options.model_dtype), options.untrained is None
    listener = load(checkpoint, device=options.device, dtype=dtype, merge=merge)
    if options.untrained:
        untrain(listener.model, options.untrained, options.seed)
    question = Question("skip", options.positions, options.layers)  # for what it refuses
    for place in reversed(question.without_patches(usable, lengths, listener.processor)):
        left_out.append(f"{usable[place].id}: nothing of it stands at {options.positions}")
        del usable[place], lengths[place]
    left_out += leave_out_too_long(listener, usable, lengths, options.on_bad_audio)
    question.check(listener.processor)
    return listener, usable, lengths, left_out


def _as_long(utterance: Utterance) -> np.ndarray:
    """Silence as long as an utterance that was loaded and found good; takes no memory."""
    return np.broadcast_to(np.float32(0), load_utterance(utterance).shape)


def batches(
    listener: Listener, utterances: Sequence[Utterance], waves: Sequence[np.ndarray]
) -> list[list[int]]:
    """Numbers of utterances of like length together; of a wave only its length is read."""
    answers = [len(listener.processor.answer_ids(plain_text(u.text))) for u in utterances]
    lengths = [listener.positions(wave, n) for wave, n in zip(waves, answers, strict=True)]
    return list(batches_by_length(lengths, BATCH_POSITIONS))


@torch.no_grad()
def write(
    listener: Listener,
    utterances: Sequence[Utterance],
    lengths: Sequence[np.ndarray],
    wanted: Wanted,
    writer: CaptureWriter,
    advance: Callable[[int], None],
) -> float:
    """Hear and write what is missing; seconds of audio that were heard.

    A batch that is there in part is heard whole, since rounding depends on who shares a batch.
    """
    heard = 0
    for batch in batches(listener, utterances, lengths):
        if not writer.done.issuperset(batch):
            waves = [load_utterance(utterances[i]) for i in batch]
            inputs = listener.processor(waves, [plain_text(utterances[i].text) for i in batch])
            with listener.capture(*wanted, take=partial(writer.add, numbers=batch)):
                hear(listener, inputs.to(listener.model.device))
            heard += sum(map(len, waves))
        advance(len(batch))
    return heard / SAMPLE_RATE


def hear(listener: Listener, inputs: BatchFeature) -> None:
    """Run the blocks over clips with their answers, and nothing behind the blocks.

    Logits would take more memory than all the rest, the more the shorter a batch's clips are.
    """
    ids = inputs["input_ids"]
    answers = {"labels": inputs["labels"], "attention_mask": inputs["attention_mask"]}
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with kinds_are(position_kinds(ids, listener.processor.speech.audio_token_id, **answers)):
        none = torch.zeros_like(ids, dtype=torch.bool)
        listener.model(**others, use_cache=False, logits_to_keep=none)


def records(utterances: Sequence[Utterance]) -> list[dict[str, Any]]:
    """What a capture's index says of each utterance."""
    return [
        {"utterance": u.id, "text": u.text, "speaker": u.speaker, "duration": u.duration}
        for u in utterances
    ]


def describe(listener: Listener, numbers: Sequence[int]) -> dict[str, Any]:
    """What a capture's index says of the model, so that rows can be read without it."""
    return {
        "residuals": list(numbers),
        "blocks": listener.n_layers,
        "kinds": [kind.name.lower() for kind in Kind],
        "patches_per_second": listener.processor.speech.rate,
    }


if __name__ == "__main__":
    run(main, resumable=True)
