"""The log-mel front end beside transformers' own."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Phi4MultimodalFeatureExtractor

from melprobe.audio.load import SAMPLE_RATE, load_utterance
from melprobe.audio.mel import frame_count, log_mel
from melprobe.corpus.manifest import find_manifest, read_manifest

BATCH = 16
ROUNDS = 9


def bench_mel() -> dict[str, float | int | str]:
    """Our log-mel against transformers' Phi-4-multimodal extractor, on built-in recordings.

    One batch of clips of different lengths, from a list of waves to a padded tensor. The two take
    turns, and the ratio is that of their median times. `max_error` is the largest difference on
    log-mel over the frames that are no padding.
    """
    waves = [load_utterance(u) for u in read_manifest(find_manifest("builtin/test"))[:BATCH]]
    extractor = Phi4MultimodalFeatureExtractor()

    def theirs() -> torch.Tensor:
        found = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return found["audio_input_features"]

    def ours() -> torch.Tensor:
        return log_mel(pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True))

    valid = torch.arange(ours().shape[1]) < torch.tensor([[frame_count(len(w))] for w in waves])
    error = (theirs() - ours())[valid].abs().max().item()
    their_time, our_time = _median_seconds(theirs, ours)
    audio = sum(map(len, waves)) / SAMPLE_RATE
    return {
        "ratio_transformers": round(their_time / our_time, 2),
        "max_error": error,
        "rtfx": round(audio / our_time),
        "rtfx_transformers": round(audio / their_time),
        "audio_seconds": round(audio, 1),
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
