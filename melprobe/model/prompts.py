"""Clips or texts to a decoder's input: words, what is heard or read, words, and the answer.

What any model's processor must give melprobe; how waves become features is a speech model's own.
Shapes: B prompts, S sequence positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from melprobe.audio.load import SAMPLE_RATE
from melprobe.hooks.anatomy import Anatomy
from melprobe.hooks.positions import Kind

Wave = np.ndarray | Tensor
Given = Wave | str
"""What stands in the middle of a prompt: a wave to hear, or a text to read."""


class Prompts(ABC):
    """Prompts with something in their middle, and answers behind them."""

    tokenizer: Any

    @property
    @abstractmethod
    def speech(self) -> Anatomy:
        """Where speech stands in the model's input."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """Token that ends an answer."""

    @property
    @abstractmethod
    def around(self) -> tuple[list[int], list[int]]:
        """Ids before the middle, BOS among them, and after it."""

    @property
    @abstractmethod
    def kinds(self) -> list[Kind]:
        """What a prompt is made of, in order; a kind named twice stands at many positions."""

    @abstractmethod
    def middles(self, given: Any, sampling_rate: int) -> tuple[BatchFeature, list[list[int]]]:
        """Inputs of the model beside the ids, and the ids in the middle of each prompt."""

    @abstractmethod
    def positions_of(self, given: Given) -> int:
        """How many positions this takes in the middle, at most."""

    def __call__(
        self,
        given: Sequence[Given] | Given,
        text: Sequence[str] | None = None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
        pad_to_multiple_of: int = 1,
    ) -> BatchFeature:
        """A batch, ready for the model, as torch tensors; S is such a multiple.

        given: waves, or texts where the model reads; a single one for a batch of one.
        Without `text`: prompts, padded on the left, for `generate`. With `text` (one answer each):
        prompt and answer, padded on the right, and `labels` (B, S), -100 off the answers.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors={return_tensors!r}: there are torch tensors only, 'pt'"
            )
        features, middles = self.middles(given, sampling_rate)
        prompts = [self._prompt(middle) for middle in middles]
        if text is None:
            rows, masks = self._pad(prompts, pad_to_multiple_of, left=True)
            return BatchFeature({"input_ids": rows, "attention_mask": masks, **features})
        text = [text] if isinstance(text, str) else text
        if len(text) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(text)} answers")
        answers = [self.answer_ids(answer) for answer in text]
        whole = [p + a for p, a in zip(prompts, answers, strict=True)]
        rows, masks = self._pad(whole, pad_to_multiple_of, left=False)
        labels = torch.full_like(rows, -100)
        for row, prompt, answer in zip(labels, prompts, answers, strict=True):
            row[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return BatchFeature(
            {"input_ids": rows, "attention_mask": masks, "labels": labels, **features}
        )

    def text_prompt(self, text: str) -> list[int]:
        """The same prompt with words where speech would stand: the text-copying control."""
        return self._prompt(self._encode(text))

    def reading(self) -> "TextPrompts":
        """The same prompts, with texts in their middle."""
        return TextPrompts(self.tokenizer, self.around, self.end_id)

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer, end token included."""
        return [*self._encode(text), self.end_id]

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Text of generated ids (S,)."""
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return text.strip()

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """Texts of generated ids (B, S), each as `decode` gives it."""
        return [self.decode(row, **kwargs) for row in ids]

    def _prompt(self, middle: list[int]) -> list[int]:
        before, after = self.around
        return [*before, *middle, *after]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _pad(self, rows: list[list[int]], multiple: int, *, left: bool) -> tuple[Tensor, Tensor]:
        width = -(-max(map(len, rows)) // multiple) * multiple
        padded = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            padded[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return padded, mask


class ClipPrompts(Prompts):
    """Prompts with speech in their middle."""

    audio_token_id: int
    """stands at speech positions"""
    before: str
    after: str
    """words around the speech"""

    @abstractmethod
    def features(self, audio: Any, sampling_rate: int) -> tuple[BatchFeature, list[int]]:
        """What the model hears of a batch of waves, and how many positions each takes."""

    @property
    def kinds(self) -> list[Kind]:
        words = [[Kind.PROMPT] * bool(text) for text in (self.before, self.after)]
        return [Kind.BOS, *words[0], Kind.SPEECH, Kind.SPEECH, *words[1]]

    def middles(self, given: Any, sampling_rate: int) -> tuple[BatchFeature, list[list[int]]]:
        if isinstance(given[0], str):
            raise TypeError("this model hears: give waves; what `reading()` gives takes texts")
        features, counts = self.features(given, sampling_rate)
        return features, [[self.audio_token_id] * n for n in counts]


class TextPrompts(Prompts):
    """Prompts with a text in their middle, to be copied: the control for those with speech."""

    def __init__(self, tokenizer: Any, around: tuple[list[int], list[int]], end_id: int):
        self.tokenizer = tokenizer
        self._around, self._end_id = around, end_id

    @property
    def speech(self) -> Anatomy:
        return Anatomy(None)

    @property
    def end_id(self) -> int:
        return self._end_id

    @property
    def around(self) -> tuple[list[int], list[int]]:
        return self._around

    @property
    def kinds(self) -> list[Kind]:
        return [Kind.BOS, Kind.PROMPT, Kind.PROMPT]

    def middles(self, given: Any, sampling_rate: int) -> tuple[BatchFeature, list[list[int]]]:
        texts = [given] if isinstance(given, str) else given
        return BatchFeature({}), [self._ids(text) for text in texts]

    def positions_of(self, given: Given) -> int:
        return len(self._ids(given))

    def _ids(self, given: Given) -> list[int]:
        if not isinstance(given, str):
            raise TypeError(f"this model reads: give texts, not {type(given).__name__}")
        return self._encode(given)
