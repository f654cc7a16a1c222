"""Capturing all residuals at speech positions to disk, beside the same forward passes without.

The same model, clips, batches, dtype and process, taking turns. Features are made before the clock
starts, for both: what capturing costs is held against the blocks alone. It is over when the last
byte has been handed to the system and the index is there.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import BatchFeature

from melprobe.audio.load import load_utterance, recording_bytes
from melprobe.capture import batches, describe, hear, records
from melprobe.corpus.manifest import Utterance, write_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.listener import Listener
from melprobe.shards import CaptureWriter

ROUNDS = 9
SHARD_MB = 64


@torch.no_grad()
def bench_capture(
    listener: Listener, utterances: Sequence[Utterance], tell: Callable[[str], None]
) -> dict[str, object]:
    """Median seconds of both, and the median of the ratios of neighbouring rounds.

    `seconds_after`: how long the disk was still at work when the last pass had ended. tell: hears
    one line for each round.
    """
    waves = [load_utterance(u) for u in utterances]
    plan = batches(listener, utterances, waves)
    inputs = [
        listener.processor([waves[i] for i in b], [plain_text(utterances[i].text) for i in b])
        for b in plan
    ]
    inputs = [batch.to(listener.model.device) for batch in inputs]
    plain, captured, after = [], [], []
    with TemporaryDirectory() as place:
        for turn in range(ROUNDS + 1):
            start = time.perf_counter()
            for batch in inputs:
                hear(listener, batch)
            _wait(listener)
            plain.append(time.perf_counter() - start)
            folder = Path(place) / "capture"
            start = time.perf_counter()
            writer, passed = _captured(listener, utterances, plan, inputs, folder)
            end = time.perf_counter()
            captured.append(end - start)
            after.append(end - passed)
            shutil.rmtree(folder)
            tell(f"round {turn} of {ROUNDS}: {plain[-1]:.2f} s, capturing {captured[-1]:.2f} s")
    # The first round is slower than the others.
    ratios = [b / a for a, b in zip(plain[1:], captured[1:], strict=True)]
    device = listener.model.device
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        "seconds": round(statistics.median(captured[1:]), 3),
        "seconds_plain": round(statistics.median(plain[1:]), 3),
        "seconds_after": round(statistics.median(after[1:]), 3),
        "utterances": len(utterances),
        "batches": len(plan),
        **writer,
        "dtype": str(listener.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _captured(
    listener: Listener,
    utterances: Sequence[Utterance],
    plan: Sequence[list[int]],
    inputs: Sequence[BatchFeature],
    folder: Path,
) -> tuple[dict[str, object], float]:
    """What a whole capture wrote, and when its last forward pass had ended."""
    numbers = range(listener.n_layers + 1)
    about = describe(listener, numbers)
    with CaptureWriter(folder, {}, about, records(utterances), SHARD_MB) as writer:
        for batch, clips in zip(inputs, plan, strict=True):
            with listener.capture(numbers, take=partial(writer.add, numbers=clips)):
                hear(listener, batch)
        _wait(listener)
        passed = time.perf_counter()
    return writer.size(), passed


def peak_memory(
    utterances: Sequence[Utterance], counts: Sequence[int], words: Sequence[str]
) -> dict[str, int]:
    """MB that `python -m melprobe.capture` held at most, by how many utterances it captured.

    Each in a process of its own. Where there are too few utterances, copies of them stand in, so
    that all runs see the same lengths. words: more of the command line. Call it before a model is
    loaded: the system counts a parent's memory as its child's until that has begun.
    """
    found = {}
    for count in counts:
        with TemporaryDirectory() as place:
            manifest = Path(place) / "data.jsonl"
            copies = []
            for i in range(count):
                u = utterances[i % len(utterances)]
                copy = Path(place) / f"{i}{u.audio.suffix}"
                copy.write_bytes(recording_bytes(u))
                copies.append(replace(u, id=copy.name, audio=copy, bytes=None))
            write_manifest(manifest, copies)
            out = ["--data", str(manifest), "--limit", "0", "--out", str(Path(place) / "out")]
            found[str(count)] = _peak_mb([*words, *out])
    return found


def _peak_mb(words: Sequence[str]) -> int:
    command = [sys.executable, "-m", "melprobe.capture", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"`{' '.join(command)}` ended with exit code {process.returncode}")
    return round(used.ru_maxrss / 1e3)


def _wait(listener: Listener) -> None:
    if listener.model.device.type == "cuda":
        torch.cuda.synchronize()
