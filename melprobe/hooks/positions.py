"""Which kind each sequence position is of, also while decoding step by step.

Kinds: `bos` (the first token: the attention sink), `prompt` (the words around the audio), `speech`
(patches), `answer` (what the model writes). `text` is prompt and answer; `all` is everything, BOS
included. `speech:0.5-1.2` is those patches whose middle sounds from 0.5 s on and before 1.2 s.
A position is named after the token that stands there, not the one predicted from it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.anatomy import Anatomy, anatomy


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


@dataclass(frozen=True, slots=True)
class Selection:
    """Which positions are meant."""

    kinds: tuple[Kind, ...]
    seconds: tuple[float, float] | None = None
    """Of speech, only what sounds from the first on and before the second."""


def parse_positions(positions: str) -> Selection:
    """`speech`, `text`, ..., or `speech:0.5-1.2`; UsageError that lists what there is."""
    name, colon, times = positions.partition(":")
    if name not in POSITIONS or (colon and name != "speech"):
        raise UsageError(
            f"positions {positions!r}: there are {', '.join(POSITIONS)}, and times of speech such "
            "as speech:0.5-1.2"
        )
    if not colon:
        return Selection(POSITIONS[name])
    try:
        start, end = map(float, times.split("-"))
    except ValueError:
        start = end = 0.0
    if not 0 <= start < end < math.inf:
        raise UsageError(
            f"positions {positions!r}: give seconds from and to, such as speech:0.5-1.2"
        )
    return Selection(POSITIONS[name], (start, end))


def position_kinds(
    input_ids: Tensor,
    audio_token_id: int | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """`Kind` of every position of a whole sequence, (B, S) int64.

    `labels` (B, S) mark the answer (not -100); without them there is none yet. Padding may stand
    on either side of an attention_mask (B, S), and before the words in one that was spread out for
    a static cache, (B, 1, S, room), which says what the last position may attend to.
    """
    kinds = torch.full_like(input_ids, Kind.PROMPT)
    if audio_token_id is not None:
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


def patches_between(start: float, stop: float, n_patches: int, speech: Anatomy) -> list[int]:
    """Of a clip's patches those whose middle sounds from `start` on and before `stop`, seconds."""
    middles = (speech.middle(patch) for patch in range(n_patches))
    return [patch for patch, middle in enumerate(middles) if start <= middle < stop]


def selected(kinds: Tensor, positions: str, speech: Anatomy) -> Tensor:
    """(B, S) bool: the positions that are meant, of the kinds (B, S) of whole sequences."""
    selection = parse_positions(positions)
    chosen = torch.isin(kinds, torch.tensor(selection.kinds, device=kinds.device))
    if selection.seconds is None:
        return chosen
    middle = _middles(kinds, speech)
    start, stop = selection.seconds
    return chosen & (start <= middle) & (middle < stop)


def _middles(kinds: Tensor, speech: Anatomy) -> Tensor:
    """(B, S) when each patch sounds, seconds; means nothing at other positions."""
    return speech.middle((kinds == Kind.SPEECH).cumsum(1) - 1)


_TOLD: ContextVar[Tensor | None] = ContextVar("kinds that a caller spelled out", default=None)


@contextmanager
def kinds_are(kinds: Tensor) -> Iterator[None]:
    """Tell every tracker what stands where, (B, K), for passes whose inputs alone don't show it."""
    token = _TOLD.set(kinds)
    try:
        yield
    finally:
        _TOLD.reset(token)


@dataclass(slots=True)
class Rows:
    """Rows of a batch, (B,) bool; may be exchanged as rows are left out of the batch."""

    rows: Tensor


_ROWS: ContextVar[Rows | None] = ContextVar("rows that cuts begun now are kept to", default=None)


@contextmanager
def rows_of(rows: Tensor) -> Iterator[Rows]:
    """Keep every tracker that begins to watch inside the `with` to these rows, (B,) bool.

    Other rows have no positions of any kind for it. Several variants can so share a batch.
    """
    only = Rows(rows)
    token = _ROWS.set(only)
    try:
        yield only
    finally:
        _ROWS.reset(token)


class PositionTracker:
    """Knows the kinds of the positions that the running forward pass computes.

    In prefill and in teacher forcing they follow from the inputs; every later decoding step
    computes answer positions only. Decoding without a cache runs over the whole sequence again
    and again, and nothing in it tells the answer from the prompt.
    """

    def __init__(self, model: PreTrainedModel):
        self.speech = anatomy(model)
        self.only = _ROWS.get()
        self._kinds_so_far: Tensor | None = None
        self._past = 0
        self._answer_is_marked = True

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
        chosen = parse_positions(positions).kinds
        if not self._answer_is_marked and (Kind.PROMPT in chosen) != (Kind.ANSWER in chosen):
            raise ValueError(
                f"positions {positions!r}: without a cache, prompt and answer can't be told apart; "
                "drop use_cache=False, give labels, or take positions 'text'"
            )
        where = selected(self.kinds_so_far, positions, self.speech)
        return where if self.only is None else where & self.only.rows[:, None]

    def middles_so_far(self) -> Tensor:
        """(B, K) when each patch sounds, seconds; means nothing at other positions."""
        return _middles(self.kinds_so_far, self.speech)

    @classmethod
    @contextmanager
    def watching(cls, model: PreTrainedModel, *positions: str) -> Iterator["PositionTracker"]:
        """Follow the forward passes of `model` while the block lasts.

        UsageError for `positions` that there are not, or that this model doesn't have.
        """
        self = cls(model)
        for wanted in positions:
            if (
                parse_positions(wanted).kinds == (Kind.SPEECH,)
                and self.speech.audio_token_id is None
            ):
                raise UsageError(
                    f"positions {wanted!r}: {type(model).__name__} hears nothing; it has prompt, "
                    "answer, text, bos and all"
                )
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
            input_ids, self.speech.audio_token_id, kwargs.get("attention_mask"), labels
        )
