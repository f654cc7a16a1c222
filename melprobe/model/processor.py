"""Waves and text to model inputs: mel frames, placeholders, labels.

A clip becomes `BOS before <audio>…<audio> after answer EOS`; `before` and `after` are the
processor's prompt. BOS stands before the audio because it is the attention sink.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from melprobe.audio.load import SAMPLE_RATE
from melprobe.audio.mel import (
    WINDOW,
    MelSettings,
    Normalisation,
    Spectrogram,
    frame_count,
    log_mel,
    normalise,
    whisper_log_mel,
)
from melprobe.audio.patches import patch_count
from melprobe.hooks.anatomy import KNOWN, Anatomy
from melprobe.model.adapter import ADAPTER
from melprobe.model.config import MelLLMConfig
from melprobe.model.prompts import ClipPrompts, Given, Wave

AUDIO_TOKEN = "<|audio|>"


class MelLLMFeatureExtractor(SequenceFeatureExtractor):
    """Waves to normalised log-mel frames.

    normalisation: `utterance`, `global` (with `mean` and `std`, one value per mel bin) or `none`.
    f_max: upper edge of the mel bank in Hz.
    spectrogram: `phi4`, or `whisper` for an encoder that was trained on Whisper's own, which
        is normalised and reaches to 8 kHz whatever the two above say.
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
        spectrogram: Spectrogram = "phi4",
        **kwargs: Any,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.f_max = f_max
        self.spectrogram = spectrogram
        self.normalisation = normalisation
        self.mean = mean
        self.std = std

    @property
    def mel_scale(self) -> str:
        """On which the filters are spaced evenly, by transformers' name."""
        return "slaney" if self.spectrogram == "whisper" else "kaldi"

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
        if self.spectrogram == "whisper":
            mel = normalise(whisper_log_mel(waves, self.feature_size), lengths, "none")
        else:
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


class MelLLMProcessor(ClipPrompts, ProcessorMixin):
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

    @property
    def end_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def speech(self) -> Anatomy:
        return KNOWN[MelLLMConfig.model_type](self)

    def features(self, audio: Any, sampling_rate: int) -> tuple[BatchFeature, list[int]]:
        """Mel frames of waves, and how many patches each takes; see `MelLLMFeatureExtractor`."""
        made = self.feature_extractor(audio, sampling_rate)
        frames = made["feature_attention_mask"].sum(1).tolist()
        return made, [patch_count(n, self.frames_per_patch) for n in frames]

    def positions_of(self, given: Given) -> int:
        return patch_count(frame_count(len(given)), self.frames_per_patch)

    @property
    def around(self) -> tuple[list[int], list[int]]:
        before, after = self._encode(self.before), self._encode(self.after)
        return [self.tokenizer.bos_token_id, *before], after


AutoFeatureExtractor.register(MelLLMConfig, MelLLMFeatureExtractor)
AutoProcessor.register(MelLLMConfig, MelLLMProcessor)
