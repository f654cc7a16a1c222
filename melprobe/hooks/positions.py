"""Which kind each sequence position is of, also while decoding step by step.

Kinds: `bos` (the first token: the attention sink), `prompt` (the words around the audio), `speech`
(patches), `answer` (what the model writes). `text` is prompt and answer; `all` is everything, BOS
included. A position is named after the token that stands there, not the one predicted from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from melprobe.errors import UsageError
from melprobe.model.modelling import MelLLMForConditionalGeneration


class Kind(IntEnum):
    """What stands at a position."""

    PADDING = 0
    BOS = 1
    PROMPT = 2
    SPEECH = 3
    ANSWER = 4


POSITIONS: dict[str, tuple[Kind, ...]] = {
    "bos": (Kind.BOS,),
    "prompt": (Kind.PROMPT,),
    "speech": (Kind.SPEECH,),
    "answer": (Kind.ANSWER,),
    "text": (Kind.PROMPT, Kind.ANSWER),
    "all": (Kind.BOS, Kind.PROMPT, Kind.SPEECH, Kind.ANSWER),
}


def check_positions(positions: str) -> str:
    """The name itself, or UsageError that lists the names there are."""
    if positions not in POSITIONS:
        raise UsageError(f"positions {positions!r}: there are {', '.join(POSITIONS)}")
    return positions


def position_kinds(
    input_ids: Tensor,
    audio_token_id: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """`Kind` of every position of a whole sequence, (B, S) int64.

    `labels` (B, S) mark the answer (not -100); without them there is none yet. Padding may stand
    on either side of an attention_mask (B, S), and before the words in one that was spread out for
    a static cache, (B, 1, S, room), which says what the last position may attend to.
    """
    kinds = torch.full_like(input_ids, Kind.PROMPT)
    kinds[input_ids == audio_token_id] = Kind.SPEECH
    if labels is not None:
        kinds[labels != -100] = Kind.ANSWER
    if attention_mask is None:
        kinds[:, 0] = Kind.BOS
        return kinds
    if attention_mask.dim() == 4:
        seen = attention_mask[:, 0, -1, : input_ids.shape[1]]
        present = seen if seen.dtype == torch.bool else seen == 0
    else:
        present = attention_mask.bool()
    kinds[present & (present.long().cumsum(1) == 1)] = Kind.BOS
    return kinds.masked_fill(~present, Kind.PADDING)


def selected(kinds: Tensor, positions: str) -> Tensor:
    """(B, S) bool: the positions of these kinds."""
    chosen = torch.tensor(POSITIONS[check_positions(positions)], device=kinds.device)
    return torch.isin(kinds, chosen)


_TOLD: ContextVar[Tensor | None] = ContextVar("kinds that a caller spelled out", default=None)


@contextmanager
def kinds_are(kinds: Tensor) -> Iterator[None]:
    """Tell every tracker what stands where, (B, K), for passes whose inputs alone don't show it."""
    token = _TOLD.set(kinds)
    try:
        yield
    finally:
        _TOLD.reset(token)


class PositionTracker:
    """Knows the kinds of the positions that the running forward pass computes.

    In prefill and in teacher forcing they follow from the inputs; every later decoding step
    computes answer positions only. Decoding without a cache runs over the whole sequence again
    and again, and nothing in it tells the answer from the prompt.
    """

    def __init__(self, audio_token_id: int):
        self.audio_token_id = audio_token_id
        self._kinds_so_far: Tensor | None = None
        self._past = 0
        self._answer_is_marked = True

    @property
    def kinds(self) -> Tensor:
        """(B, S) for the current forward pass."""
        return self.kinds_so_far[:, self._past :]

    @property
    def kinds_so_far(self) -> Tensor:
        """(B, K) for the current forward pass and all that the cache holds from earlier ones."""
        if self._kinds_so_far is None:
            raise RuntimeError("the decoder ran without the model around it: kinds are unknown")
        return self._kinds_so_far

    def selected(self, positions: str) -> Tensor:
        """(B, S) bool: the positions of these kinds in the current forward pass.

        Raises ValueError where prompt and answer must be told apart and can't be.
        """
        return self.selected_so_far(positions)[:, self._past :]

    def selected_so_far(self, positions: str) -> Tensor:
        """(B, K) bool: likewise, and among the positions in the cache."""
        chosen = POSITIONS[check_positions(positions)]
        if not self._answer_is_marked and (Kind.PROMPT in chosen) != (Kind.ANSWER in chosen):
            raise ValueError(
                f"positions {positions!r}: without a cache, prompt and answer can't be told apart; "
                "drop use_cache=False, give labels, or take positions 'text'"
            )
        return selected(self.kinds_so_far, positions)

    @contextmanager
    def watching(self, model: MelLLMForConditionalGeneration) -> Iterator["PositionTracker"]:
        """Follow the forward passes of `model` while the block lasts."""
        handle = model.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True)
        try:
            yield self
        finally:
            handle.remove()
            self._kinds_so_far = None

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("interventions find positions in input_ids; inputs_embeds has none")
        told = _TOLD.get()
        if told is not None:
            self._answer_is_marked = True
            self._past = told.shape[1] - input_ids.shape[1]
            self._kinds_so_far = told
            return
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        if self._past:
            known = self._kinds_so_far
            if known is None or known.shape[1] < self._past:
                raise ValueError("the cache was filled before the intervention began: begin anew")
            self._answer_is_marked = True
            new = torch.full_like(input_ids, Kind.ANSWER)
            self._kinds_so_far = torch.cat([known[:, : self._past], new], 1)
            return
        labels = kwargs.get("labels")
        self._answer_is_marked = labels is not None or kwargs.get("use_cache") is not False
        self._kinds_so_far = position_kinds(
            input_ids, self.audio_token_id, kwargs.get("attention_mask"), labels
        )
