"""`python -m melprobe.bench mel --json`: how fast, beside what others offer, on this machine."""

import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import Phi4MultimodalFeatureExtractor

from melprobe.audio.load import SAMPLE_RATE, load_utterance
from melprobe.audio.mel import log_mel
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import Parser, run

BATCH = 16
ROUNDS = 9


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its figures."""
    p = Parser(prog="python -m melprobe.bench", description=__doc__)
    p.add_argument("what", choices=("mel",))
    p.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = p.parse_args(argv)
    figures = bench_mel()
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")


def bench_mel() -> dict[str, float | int | str]:
    """Our log-mel against transformers' Phi-4-multimodal extractor, on the built-in recordings.

    Batches of clips of one length, as the extractor takes them; the two take turns, and the ratio
    is that of their median times. `max_error` is the largest difference on log-mel.
    """
    clips = [load_utterance(u) for u in read_manifest(find_manifest("builtin/test"))]
    waves = [np.resize(clip, 4 * SAMPLE_RATE) for clip in clips[:BATCH]]
    extractor = Phi4MultimodalFeatureExtractor()

    def theirs() -> torch.Tensor:
        found = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return found["audio_input_features"]

    def ours() -> torch.Tensor:
        return log_mel(torch.from_numpy(np.stack(waves)))

    error = (theirs() - ours()).abs().max().item()
    their_time, our_time = _median_seconds(theirs, ours)
    audio = len(waves) * 4
    return {
        "ratio_transformers": round(their_time / our_time, 2),
        "max_error": error,
        "rtfx": round(audio / our_time),
        "rtfx_transformers": round(audio / their_time),
        "audio_seconds": audio,
        "threads": torch.get_num_threads(),
    }


def _median_seconds(*functions: Callable[[], object]) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, seconds in zip(functions, times, strict=True):
            function()  # what the other one left in the caches is not its fault
            for _ in range(3):
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    run(main)
