"""What melprobe must know of a model class: which input positions are speech, and when they sound.

Everything else goes by what transformers' models have in common: `get_decoder().layers`, labels,
`generate`. Another class needs one line in `KNOWN`: docs/other-models.md shows how.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from melprobe.audio.patches import patch_span
from melprobe.errors import UsageError


class Anatomy(NamedTuple):
    """Where speech stands in a model's input."""

    audio_token_id: int | None
    """What `input_ids` holds at speech positions; None for a model that only reads."""
    seconds: float = math.nan
    """From one speech position to the next."""
    lead: float = 0.0
    """When the first one begins, in seconds."""
    masks_logits: bool = False
    """Whether `logits_to_keep` may be a mask (B, S), which computes no logits beside it."""

    @property
    def rate(self) -> float:
        """Speech positions a second."""
        return round(1 / self.seconds, 6)

    def middle(self, number: Any) -> Any:
        """When speech position `number` (from 0; or a tensor of them) sounds, in seconds.

        Where an encoder stands before the decoder, a position has heard much more than that.
        """
        return self.lead + (number + 0.5) * self.seconds


def _mel_llm(config: Any) -> Anatomy:
    start, end = patch_span(0, config.frames_per_patch)
    return Anatomy(config.audio_token_id, end - start, start, masks_logits=True)


def _phi4_multimodal(config: Any) -> Anatomy:
    audio = config.audio_config
    return Anatomy(audio.audio_token_id, 0.01 * audio.time_reduction)


def _granite_speech(config: Any) -> Anatomy:
    # Of each window of 20 ms frames a Q-former makes window_size // downsample_rate positions.
    return Anatomy(config.audio_token_id, 0.02 * config.downsample_rate)


KNOWN: dict[str, Callable[[Any], Anatomy]] = {
    "mel_llm": _mel_llm,
    "phi4_multimodal": _phi4_multimodal,
    "gemma4_unified": lambda config: Anatomy(config.audio_token_id, 0.04),  # raw frames
    "granite_speech": _granite_speech,
    "qwen2_audio": lambda config: Anatomy(config.audio_token_id, 0.04),  # Whisper's, pooled by 2
    "qwen3_asr": lambda config: Anatomy(config.audio_token_id, 1 / 13),  # 13 from 1 s
    "voxtral": lambda config: Anatomy(config.audio_token_id, 0.08),  # Whisper's, stacked by 4
}
"""`config.model_type` to what reads its config."""


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Of a speech model in `KNOWN`, or of a plain language model.

    Raises UsageError for a class that is neither.
    """
    kind = model.config.model_type
    if kind in KNOWN:
        return KNOWN[kind](model.config)
    if only_reads(model.config):
        return Anatomy(None)
    raise UsageError(
        f"{type(model).__name__} ({kind}) has no adapter: say in melprobe.hooks.anatomy.KNOWN "
        "which token stands at its speech positions and how many seconds each is; "
        f"docs/other-models.md shows how. There are: {', '.join(KNOWN)}, and plain language models"
    )


def only_reads(config: Any) -> bool:
    """Whether this is the configuration of a plain language model of transformers."""
    hears = any("audio" in name or "speech" in name for name in config.to_dict())
    plain = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return plain and config.model_type not in KNOWN and not hears
