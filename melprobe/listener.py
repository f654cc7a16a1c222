"""The door to the library: a loaded model with its processor, ready to listen and to be cut.

>>> lm = melprobe.load("mel-smol")                              # doctest: +SKIP
>>> with lm.skip({3, 5}, positions="speech"):                   # doctest: +SKIP
...     lm.transcribe([wave])
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.hooks.capture import capture
from melprobe.hooks.cuts import BlockChange, bypass, knock_out, skip, watch_blocks
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.lora import without_lora
from melprobe.hooks.parts import Part, ablate
from melprobe.hooks.patching import Entering, attribution, entering, patch
from melprobe.hooks.replay import Replay
from melprobe.model import checkpoint
from melprobe.model.base import place_of
from melprobe.model.inference import AnswerScores, answer_scores, transcribe
from melprobe.model.others import load_other
from melprobe.model.prompts import Given, Prompts
from melprobe.shards import Caught

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Listener:
    """A model and its processor; every method takes and gives what a person would.

    What it is given are waves (float32, mono, 16 kHz), or texts where it reads: see `reading`.
    """

    model: PreTrainedModel
    processor: Prompts

    @property
    def n_layers(self) -> int:
        return len(decoder_blocks(self.model))

    @property
    def room(self) -> int:
        """Positions that the decoder has for prompt and answer."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or sys.maxsize

    def reading(self) -> "Listener":
        """The same model, given texts to copy in the place of waves: the control for listening.

        >>> lm.reading().transcribe(["please hold"])                # doctest: +SKIP
        """
        return Listener(self.model, self.processor.reading())

    def positions(self, given: Given, answer_tokens: int) -> int:
        """How many of them this takes with an answer so long."""
        middle = self.processor.positions_of(given)
        return len(self.processor.text_prompt("")) + middle + answer_tokens

    def transcribe(self, given: Sequence[Given], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, as one batch."""
        if not len(given):
            return []
        return transcribe(self.model, self.processor, given, max_new_tokens)

    def score(self, given: Sequence[Given], texts: Sequence[str]) -> AnswerScores:
        """Likelihood of each text, in plain form, as the answer to what is given, as one batch."""
        return answer_scores(self.model, self.processor, given, [plain_text(t) for t in texts])

    def replay(
        self, given: Sequence[Given], texts: Sequence[str], max_new_tokens: int = 64
    ) -> Replay:
        """Hear a batch once, to hear it again and again under interventions for little."""
        plain = [plain_text(t) for t in texts]
        return Replay(self.model, self.processor, given, plain, max_new_tokens)

    def skip(
        self, layers: Iterable[int], positions: str = "speech"
    ) -> AbstractContextManager[None]:
        """Skip blocks at positions inside a `with`: not processed there, still read from elsewhere.

        See `melprobe.hooks.cuts`.
        """
        return skip(self.model, layers, positions)

    def knock_out(
        self,
        layers: Iterable[int],
        positions: str = "speech",
        readers: str | None = None,
        beyond: float = 0.0,
    ) -> AbstractContextManager[None]:
        """Hide positions in blocks inside a `with`: processed there, not read from elsewhere.

        Or not read by `readers`; see `melprobe.hooks.cuts`.
        """
        return knock_out(self.model, layers, positions, readers, beyond)

    def bypass(
        self, layers: Iterable[int], positions: str = "speech"
    ) -> AbstractContextManager[None]:
        """Lead positions around blocks inside a `with`: neither processed nor read."""
        return bypass(self.model, layers, positions)

    def ablate(
        self,
        parts: Iterable[Part],
        positions: str = "speech",
        values: Mapping[Part, Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Replace what attention, MLPs or heads contribute; see `melprobe.hooks.parts`."""
        return ablate(self.model, parts, positions, values)

    def entering(self, given: Sequence[Given], positions: str = "speech") -> Entering:
        """What enters each block at these positions of a batch, for `patch`."""
        return entering(self.model, self.processor(given).to(self.model.device), positions)

    def patch(
        self, values: Mapping[int, Sequence[Tensor]], positions: str = "speech"
    ) -> AbstractContextManager[None]:
        """Put what entered blocks in another run into this one; see `melprobe.hooks.patching`.

        Each clip must be as long as in the other run.
        """
        return patch(self.model, values, positions)

    def attribution(
        self,
        clean: Sequence[Given],
        corrupted: Sequence[Given],
        texts: Sequence[str],
        positions: str = "speech",
    ) -> Tensor:
        """(L, B) what patching each block would change of each text's NLL, to first order, nat.

        See `melprobe.hooks.patching.attribution`.
        """
        inputs = self.processor(corrupted, [plain_text(t) for t in texts]).to(self.model.device)
        return attribution(self.model, inputs, self.entering(clean, positions), positions)

    def without_lora(
        self, layers: Iterable[int], positions: str = "all"
    ) -> AbstractContextManager[None]:
        """Run blocks on the base model's weights inside a `with`; see `melprobe.hooks.lora`."""
        return without_lora(self.model, layers, positions)

    def watch_blocks(self, positions: str = "speech") -> AbstractContextManager[BlockChange]:
        """Measure how far each block turns the residual inside a `with`."""
        return watch_blocks(self.model, positions)

    def capture(
        self,
        numbers: Iterable[int],
        positions: str = "speech",
        dtype: torch.dtype | None = None,
        *,
        take: Callable[[Caught], object],
    ) -> AbstractContextManager[None]:
        """Hand h_l, for each l of `numbers`, to `take` after every pass inside a `with`.

        Sees what interventions leave; h_l enters block l. See `melprobe.hooks.capture`.
        """
        return capture(self.model, numbers, positions, dtype, take=take)


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> Listener:
    """A checkpoint by name (`mel-smol`) or folder.

    device: the first GPU, else the CPU, when not given. dtype: see `fast_dtype`. merge:
    fold LoRA into the weights, which costs nothing later; `without_lora` needs it apart.
    """
    place = pick_device(device)
    with _no_progress_bars():
        dtype = dtype or fast_dtype(place)
        model, processor = checkpoint.load(name, dtype=dtype, device=place, merge=merge)
    return Listener(model, processor)


def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
) -> Listener:
    """Someone else's speech LLM by hub id or folder; see `melprobe.model.others`.

    Or a plain language model, which reads; `smollm2-135m` and `mini-base` are those of ours.

    device, dtype: as in `load`. device_map: as in transformers, in place of `device`.
    """
    place = pick_device(device)
    with _no_progress_bars():
        dtype = dtype or fast_dtype(place)
        found = load_other(place_of(name), dtype=dtype, device=place, device_map=device_map)
        return Listener(*found)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes a second; transformers' bar for it would stand in the way of ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is; UsageError when it isn't there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {str(device)!r}: take cpu, cuda or cuda:N") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {place}: this torch ({torch.__version__}) sees no GPU; take cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {place}: there are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    if place.type not in {"cpu", "cuda"}:
        raise UsageError(f"device {place}: take cpu, cuda or cuda:N")
    return place


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (GPUs, CPUs with AMX), else float32."""
    if device.type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32
