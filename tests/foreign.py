"""Other people's speech LLMs, tiny and with random weights, and inputs for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

N_LAYERS = 4
SPEECH, BOS, EOS, PAD, VOCABULARY = 60, 1, 2, 0, 64
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def phi4_multimodal() -> PreTrainedModel:
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 4,
        "audio_token_id": SPEECH,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "crop_size": 28,
        "image_size": 28,
        "image_token_id": SPEECH + 1,
    }
    text = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    config = Phi4MultimodalConfig(**text, audio_config=audio, vision_config=vision)
    return Phi4MultimodalForCausalLM(config)


def gemma4_unified(**text: Any) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
    text = {**_TEXT, "layer_types": kinds, "sliding_window": 512, **text}
    audio = {"audio_embed_dim": 640}
    config = Gemma4UnifiedConfig(text_config=text, audio_config=audio, audio_token_id=SPEECH)
    return Gemma4UnifiedForConditionalGeneration(config)


def _whisper_like(**more: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 80,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        **more,
    }


def qwen2_audio() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "qwen2"}
    audio = _whisper_like(max_source_positions=50)
    config = Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=SPEECH)
    return Qwen2AudioForConditionalGeneration(config)


def voxtral() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "llama"}
    audio = {
        "num_mel_bins": 80,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_source_positions": 100,
    }
    config = VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=SPEECH)
    return VoxtralForConditionalGeneration(config)


def granite_speech() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "granite"}
    encoder = {"num_layers": 1, "hidden_dim": 16, "num_heads": 2, "context_size": 20}
    projector = {
        "model_type": "blip_2_qformer",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "encoder_hidden_size": 16,
    }
    config = GraniteSpeechConfig(
        text_config=text,
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=SPEECH,
        has_lora_adapter=False,
    )
    return GraniteSpeechForConditionalGeneration(config)


def qwen3_asr() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "qwen3"}
    audio = _whisper_like(output_dim=32, downsample_hidden_size=8)
    config = Qwen3ASRConfig(
        text_config=text, audio_config=audio, audio_token_id=SPEECH, pad_token_id=PAD
    )
    return Qwen3ASRForConditionalGeneration(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_TEXT))


def _phi4_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    made = Phi4MultimodalFeatureExtractor()(waves, sampling_rate=16_000, return_tensors="pt")
    return dict(made), made["audio_embed_sizes"].tolist()


def _gemma_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    made = Gemma4UnifiedAudioFeatureExtractor()(waves, return_tensors="pt")
    return dict(made), made["input_features_mask"].sum(1).tolist()


def _qwen2_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    made = extractor(waves, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    frames = made["attention_mask"].sum(1)
    audio = {
        "input_features": made["input_features"],
        "feature_attention_mask": made["attention_mask"],
    }
    return audio, (((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()


def _voxtral_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    made = extractor(waves, sampling_rate=16_000, return_tensors="pt")
    return {"input_features": made["input_features"]}, [25] * len(waves)


def _granite_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    """Its extractor needs torchaudio, so these are no spectrograms."""
    frames = [len(wave) // 320 for wave in waves]
    features = torch.randn(len(waves), max(frames), 160)
    sizes = torch.tensor([3 * -(-n // 15) for n in frames])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    return {"input_features": features, "input_features_mask": mask}, sizes.tolist()


def _qwen3_audio(waves: list[Any]) -> tuple[dict[str, Any], list[int]]:
    extractor = Qwen3ASRFeatureExtractor(feature_size=80)
    made = extractor(
        waves, sampling_rate=16_000, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    mask = made["attention_mask"]
    audio = {"input_features": made["input_features"], "input_features_mask": mask}
    frames = mask.sum(1)
    rest = frames % 100
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return audio, (rest + 13 * (frames // 100)).tolist()


class Foreign(NamedTuple):
    """A class of models, and what its own feature extractor makes of waves."""

    build: Callable[[], PreTrainedModel]
    audio: Callable[[list[Any]], tuple[dict[str, Any], list[int]]]
    """Inputs of the model, and how many positions each wave takes."""


FOREIGN = {
    "phi4_multimodal": Foreign(phi4_multimodal, _phi4_audio),
    "gemma4_unified": Foreign(gemma4_unified, _gemma_audio),
    "qwen2_audio": Foreign(qwen2_audio, _qwen2_audio),
    "voxtral": Foreign(voxtral, _voxtral_audio),
    "granite_speech": Foreign(granite_speech, _granite_audio),
    "qwen3_asr": Foreign(qwen3_asr, _qwen3_audio),
    "llama": Foreign(llama, lambda waves: ({}, [0] * len(waves))),
}


def prompts(name: str, waves: list[Any]) -> dict[str, Any]:
    """Beginning, speech, and words behind it, padded on the left."""
    audio, counts = FOREIGN[name].audio(waves)
    rows = [[BOS, *[SPEECH] * n, *(5 + i % 7 for i in range(4 + k))] for k, n in enumerate(counts)]
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **audio}


def positions_of(inputs: dict[str, Any]) -> torch.Tensor:
    """As generate numbers them, (B, S)."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
