"""Waves and text to model inputs: mel frames, placeholders, labels.

A clip becomes `BOS before <audio>…<audio> after answer EOS`; `before` and `after` are the
processor's prompt. BOS stands before the audio because it is the attention sink.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from melprobe.audio.load import SAMPLE_RATE
from melprobe.audio.mel import (
    WINDOW,
    MelSettings,
    Normalisation,
    frame_count,
    log_mel,
    normalise,
)
from melprobe.audio.patches import patch_count
from melprobe.model.adapter import ADAPTER
from melprobe.model.config import MelLLMConfig

AUDIO_TOKEN = "<|audio|>"
Wave = np.ndarray | Tensor


class MelLLMFeatureExtractor(SequenceFeatureExtractor):
    """Waves to normalised log-mel frames.

    normalisation: `utterance`, `global` (with `mean` and `std`, one value per mel bin) or `none`.
    f_max: upper edge of the mel bank in Hz.
    """

    model_input_names = ["input_features", "feature_attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = SAMPLE_RATE,
        padding_value: float = 0.0,
        f_max: float = 7690.0,
        normalisation: Normalisation = "utterance",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.f_max = f_max
        self.normalisation = normalisation
        self.mean = mean
        self.std = std

    def __call__(
        self, audio: Sequence[Wave] | Wave, sampling_rate: int = SAMPLE_RATE
    ) -> BatchFeature:
        """Mono waves in [-1, 1] to `input_features` (B, T, M) and `feature_attention_mask` (B, T).

        audio: waves (N,), or a single one for a batch of one. Raises ValueError for another
        sampling rate, more than one channel, NaN or infinity, or a clip shorter than one window
        (25 ms).
        """
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"audio is at {sampling_rate} Hz, the model at {self.sampling_rate} Hz"
            )
        if isinstance(audio, Wave) and audio.ndim == 1:
            audio = [audio]
        waves = [torch.as_tensor(wave, dtype=torch.float32) for wave in audio]
        for wave in waves:
            if wave.ndim != 1:
                raise ValueError(
                    f"a wave of shape {tuple(wave.shape)}: give one channel, (samples,)"
                )
            if not wave.isfinite().all():
                raise ValueError("a wave holds NaN or infinite samples")
        shortest = min(len(wave) for wave in waves)
        if shortest < WINDOW:
            raise ValueError(f"a clip of {shortest} samples is shorter than one window, {WINDOW}")
        lengths = torch.tensor([frame_count(len(wave)) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        mel = log_mel(padded, MelSettings(self.feature_size, self.f_max))
        mel = normalise(
            mel, lengths, self.normalisation, self._stat(self.mean), self._stat(self.std)
        )
        mask = torch.arange(mel.shape[1]) < lengths[:, None]
        return BatchFeature({"input_features": mel, "feature_attention_mask": mask})

    @staticmethod
    def _stat(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values)


class MelLLMProcessor(ProcessorMixin):
    """Feature extractor, tokenizer and prompt of a Mel-LLM.

    frames_per_patch must equal the model's; before, after: prompt text around the patches.
    """

    def __init__(
        self,
        feature_extractor: MelLLMFeatureExtractor,
        tokenizer: Any,
        frames_per_patch: int = 8,
        before: str = "",
        after: str = "",
        **kwargs: Any,
    ):
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            # `add_special_tokens` would put it in place of the extra tokens that a base has.
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        # Qwen's tokenizer has no BOS, Llama 3's no padding: the end token stands in for either.
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self.frames_per_patch = frames_per_patch
        self.before = before
        self.after = after
        super().__init__(feature_extractor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint's processor; beside an adapter, with the base model's tokenizer."""
        folder = Path(pretrained_model_name_or_path)
        if not (folder / ADAPTER).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        from melprobe.model.checkpoint import load_processor, read_config

        return load_processor(folder, read_config(folder))

    def __call__(
        self,
        audio: Sequence[Wave] | Wave,
        text: Sequence[str] | None = None,
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A batch of clips, ready for the model, as torch tensors.

        Without `text`: prompts, padded on the left, for `generate`. With `text` (one answer per
        clip): prompt and answer, padded on the right, and `labels` (B, S), -100 off the answers.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors={return_tensors!r}: there are torch tensors only, 'pt'"
            )
        features = self.feature_extractor(audio, sampling_rate)
        frames = features["feature_attention_mask"].sum(1).tolist()
        prompts = [self._prompt(patch_count(n, self.frames_per_patch)) for n in frames]
        if text is None:
            rows, masks = self._pad(prompts, left=True)
            return BatchFeature({"input_ids": rows, "attention_mask": masks, **features})
        text = [text] if isinstance(text, str) else text
        if len(text) != len(prompts):
            raise ValueError(f"{len(prompts)} clips but {len(text)} texts")
        answers = [self.answer_ids(answer) for answer in text]
        rows, masks = self._pad([p + a for p, a in zip(prompts, answers, strict=True)], left=False)
        labels = torch.full_like(rows, -100)
        for row, prompt, answer in zip(labels, prompts, answers, strict=True):
            row[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return BatchFeature(
            {"input_ids": rows, "attention_mask": masks, "labels": labels, **features}
        )

    def text_prompt(self, text: str) -> list[int]:
        """The same prompt with words where the patches would stand: the text-copying control."""
        return self._prompt_around(self._encode(text))

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer, end token included."""
        return [*self._encode(text), self.tokenizer.eos_token_id]

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Text of generated ids (S,)."""
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        return text.strip()

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """Texts of generated ids (B, S), each as `decode` gives it."""
        return [self.decode(row, **kwargs) for row in ids]

    def _prompt(self, n_patches: int) -> list[int]:
        return self._prompt_around([self.audio_token_id] * n_patches)

    def _prompt_around(self, middle: list[int]) -> list[int]:
        before, after = self._encode(self.before), self._encode(self.after)
        return [self.tokenizer.bos_token_id, *before, *middle, *after]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _pad(self, rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        padded = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            padded[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return padded, mask


AutoFeatureExtractor.register(MelLLMConfig, MelLLMFeatureExtractor)
AutoProcessor.register(MelLLMConfig, MelLLMProcessor)
