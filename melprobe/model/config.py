"""What a Mel-LLM is made of: any causal language model, an audio front, the base it grew from."""

from typing import Any, Literal, get_args

from transformers import (
    AutoConfig,
    GenerationConfig,
    Phi4MultimodalAudioConfig,
    PreTrainedConfig,
    WhisperConfig,
)

from melprobe.audio.patches import FRAMES_PER_PATCH
from melprobe.errors import UsageError

AudioFront = Literal["linear", "conv", "whisper", "phi4"]
AudioAttention = Literal["causal", "bidirectional"]

ENCODERS: dict[str, type[PreTrainedConfig]] = {
    "whisper": WhisperConfig,
    "phi4": Phi4MultimodalAudioConfig,
}


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise UsageError(f"{name} is {value!r}; it must be one of: {listed}")


class MelLLMConfig(PreTrainedConfig):
    """Configuration of `MelLLMForConditionalGeneration`.

    text_config: the decoder's own configuration (any causal LM of transformers).
    audio_front: `linear` stacks the frames of a patch and projects them; `conv` is a light
        convolutional subsampler, much like Phi-4-multimodal's, and a two-layer projection;
        `whisper` is Whisper's encoder, its outputs stacked to the same rate, and a two-layer
        projection; `phi4` is what Phi-4-multimodal has before its decoder, with its Conformer
        blocks or without.
    frames_per_patch: 10 ms mel frames per position: 1, 2, 4, 8 or 16 (100 to 6.25 Hz).
    conv_channels: channels of the `conv` front.
    encoder_config: of the `whisper` or `phi4` front's encoder.
    encoder, encoder_sha256: name and weight hash of the model whose encoder hears as it was
        trained; empty when the front's own tensors hold one that was trained further, or drawn.
    audio_attention: whether patches may look ahead inside their own span.
    audio_token_id: placeholder id that the processor puts where patches go.
    speech_exit: the block after which patches leave the decoder; None when they run through it
        (see `melprobe.model.exit`).
    base, base_sha256: name and weight hash of the language model it grew from, which adapters sit
        on; empty when it grew from none.
    """

    model_type = "mel_llm"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        audio_front: AudioFront = "linear",
        n_mels: int = 80,
        frames_per_patch: int = 8,
        conv_channels: int = 128,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        encoder: str = "",
        encoder_sha256: str = "",
        audio_attention: AudioAttention = "causal",
        audio_token_id: int = -1,
        speech_exit: int | None = None,
        base: str = "",
        base_sha256: str = "",
        **kwargs: Any,
    ):
        _require("audio_front", audio_front, get_args(AudioFront))
        _require("audio_attention", audio_attention, get_args(AudioAttention))
        _require("frames_per_patch", frames_per_patch, tuple(FRAMES_PER_PATCH.values()))
        if isinstance(text_config, dict):
            fields = dict(text_config)
            text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        kind = ENCODERS.get(audio_front)
        if isinstance(encoder_config, dict) and kind:
            encoder_config = kind(**encoder_config)
        if not isinstance(encoder_config, kind or type(None)):
            raise UsageError(
                f"audio_front {audio_front}: encoder_config goes with whisper and phi4 alone, and "
                "is of their own encoder"
            )
        if audio_front == "whisper" and frames_per_patch == 1:
            raise UsageError("frames_per_patch 1: Whisper's encoder has one output for 2 frames")
        if isinstance(encoder_config, Phi4MultimodalAudioConfig):
            made_of = encoder_config.time_reduction
            if frames_per_patch != made_of:
                raise UsageError(
                    f"frames_per_patch {frames_per_patch}: Phi-4's encoder has one output for "
                    f"{made_of} frames"
                )
        self.text_config: Any = text_config or AutoConfig.for_model("llama")
        self.audio_front = audio_front
        self.n_mels = n_mels
        self.frames_per_patch = frames_per_patch
        self.conv_channels = conv_channels
        self.encoder_config: Any = encoder_config
        self.encoder = encoder
        self.encoder_sha256 = encoder_sha256
        self.audio_attention = audio_attention
        self.audio_token_id = audio_token_id
        self.speech_exit = speech_exit
        self.base = base
        self.base_sha256 = base_sha256
        tied = getattr(self.text_config, "tie_word_embeddings", False)
        kwargs.setdefault("tie_word_embeddings", tied)
        super().__init__(**kwargs)


def token_ids_only(config: GenerationConfig) -> GenerationConfig:
    """Where text begins and ends, without the base's habits of sampling or punishing repeats."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
