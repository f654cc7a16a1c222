"""Clips to a decoder's input: words, speech positions, words, and the answer.

What any speech model's processor must give melprobe; how waves become features is its own.
Shapes: B clips, S sequence positions.
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

Wave = np.ndarray | Tensor


class ClipPrompts(ABC):
    """Prompts with speech in their middle, and answers behind them."""

    tokenizer: Any
    audio_token_id: int
    """stands at speech positions"""
    before: str
    after: str
    """words around the speech"""

    @property
    @abstractmethod
    def speech(self) -> Anatomy:
        """Where speech stands in the model's input."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """Token that ends an answer."""

    @abstractmethod
    def features(self, audio: Any, sampling_rate: int) -> tuple[BatchFeature, list[int]]:
        """What the model hears of a batch of waves, and how many positions each takes."""

    @abstractmethod
    def positions_of(self, n_samples: int) -> int:
        """How many speech positions a wave at 16 kHz takes, at most."""

    @abstractmethod
    def _around(self, middle: list[int]) -> list[int]:
        """A whole prompt with these tokens in the place of speech."""

    def __call__(
        self,
        audio: Sequence[Wave] | Wave,
        text: Sequence[str] | None = None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
        pad_to_multiple_of: int = 1,
    ) -> BatchFeature:
        """A batch of clips, ready for the model, as torch tensors; S is such a multiple.

        Without `text`: prompts, padded on the left, for `generate`. With `text` (one answer per
        clip): prompt and answer, padded on the right, and `labels` (B, S), -100 off the answers.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors={return_tensors!r}: there are torch tensors only, 'pt'"
            )
        features, counts = self.features(audio, sampling_rate)
        prompts = [self._around([self.audio_token_id] * n) for n in counts]
        if text is None:
            rows, masks = self._pad(prompts, pad_to_multiple_of, left=True)
            return BatchFeature({"input_ids": rows, "attention_mask": masks, **features})
        text = [text] if isinstance(text, str) else text
        if len(text) != len(prompts):
            raise ValueError(f"{len(prompts)} clips but {len(text)} texts")
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
        return self._around(self._encode(text))

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
