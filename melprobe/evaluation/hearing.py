"""Who transcribes: a Mel-LLM, or Whisper base as the ceiling."""

from bisect import bisect_right
from functools import cached_property
from typing import Literal

import numpy as np

from melprobe.analysis.protocol import answer_limit, leave_out, leave_out_too_long
from melprobe.audio.load import SAMPLE_RATE
from melprobe.corpus.manifest import Utterance
from melprobe.evaluation.rows import Transcriber
from melprobe.listener import Listener, load, pick_device
from melprobe.model.checkpoint import find_checkpoint
from melprobe.model.whisper import JUDGE, WINDOW_SECONDS, load_whisper, transcribe

LONGEST_SECONDS = 3600
TOKENS, TOKENS_PER_SECOND = 16, 12
"""Hurried speech in a small vocabulary."""


def open_listener(checkpoint: str, device: str | None) -> Listener | None:
    """A checkpoint's model; None stands for Whisper, which is no Mel-LLM."""
    return None if checkpoint == JUDGE else load(checkpoint, device=device)


def leave_out_unheard(
    listener: Listener | None,
    utterances: list[Utterance],
    waves: list[np.ndarray],
    on_bad: Literal["error", "skip"],
) -> list[str]:
    """`leave_out_too_long`, also for Whisper, which hears 30 s."""
    if listener:
        return leave_out_too_long(listener, utterances, waves, on_bad)

    def reason(place: int) -> str | None:
        seconds = len(waves[place]) / SAMPLE_RATE
        if seconds <= WINDOW_SECONDS:
            return None
        return f"{seconds:.1f} s, and Whisper hears 30 s at once: cut it"

    return leave_out(utterances, waves, reason, on_bad)


def transcriber(
    listener: Listener | None, utterances: list[Utterance], device: str | None
) -> Transcriber:
    """A model as a function of a batch of waves."""
    if listener is None:
        return whisper(device)
    limit = answer_limit(listener, utterances)
    return lambda waves: listener.transcribe(waves, limit)


def whisper(device: str | None) -> Transcriber:
    """Whisper base from the packages as a function of a batch of waves."""
    place = pick_device(device)
    model, processor = load_whisper(JUDGE)
    model.to(place)
    return lambda waves: transcribe(waves, model, processor)


class Model:
    """A checkpoint as a function of waves of any length, loaded when something is to be heard."""

    def __init__(self, checkpoint: str, device: str | None) -> None:
        if checkpoint != JUDGE:
            find_checkpoint(checkpoint)
        self.checkpoint, self.device = checkpoint, device
        pick_device(device)

    @cached_property
    def _hearing(self) -> tuple[Transcriber, int]:
        """A function of waves to texts, and how many samples of a wave it takes."""
        listener = open_listener(self.checkpoint, self.device)
        if listener is None:
            return whisper(self.device), int(WINDOW_SECONDS * SAMPLE_RATE)

        def positions(seconds: int) -> int:
            wave = np.broadcast_to(np.float32(0), seconds * SAMPLE_RATE)
            return listener.positions(wave, answer_tokens(seconds))

        def hear(waves: list[np.ndarray]) -> list[str]:
            return listener.transcribe(waves, answer_tokens(max(map(len, waves)) / SAMPLE_RATE))

        seconds = bisect_right(range(1, LONGEST_SECONDS + 1), listener.room, key=positions)
        return hear, seconds * SAMPLE_RATE

    @property
    def most(self) -> int:
        """Samples of a wave that it hears; the rest is cut off."""
        return self._hearing[1]

    def __call__(self, waves: list[np.ndarray]) -> list[str]:
        return self._hearing[0]([wave[: self.most] for wave in waves])


def answer_tokens(seconds: float) -> int:
    """Room for what may be said in so many seconds; `answer_limit` looks at references."""
    return TOKENS + int(TOKENS_PER_SECOND * seconds)
