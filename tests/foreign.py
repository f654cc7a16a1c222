"""Other people's speech LLMs, tiny and with random weights, and inputs for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
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
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

from melprobe.hooks.anatomy import anatomy
from melprobe.listener import Listener
from melprobe.model.config import token_ids_only
from melprobe.model.others import LISTENING, OtherProcessor
from tests.tiny import WORDS

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


class FakeGraniteExtractor:
    """Theirs needs torchaudio, so these are no spectrograms."""

    def __call__(self, waves: list[Any]) -> dict[str, Any]:
        frames = [len(wave) // 320 for wave in waves]
        noise = torch.Generator().manual_seed(sum(frames))
        features = torch.randn(len(waves), max(frames), 160, generator=noise)
        sizes = torch.tensor([3 * -(-n // 15) for n in frames])
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        return {
            "input_features": features,
            "input_features_mask": mask,
            "audio_embed_sizes": sizes,
        }


class Foreign(NamedTuple):
    """A class of models, and its feature extractor; none for one that only reads."""

    build: Callable[[], PreTrainedModel]
    extractor: Callable[[], Any] | None


FOREIGN = {
    "phi4_multimodal": Foreign(phi4_multimodal, Phi4MultimodalFeatureExtractor),
    "gemma4_unified": Foreign(gemma4_unified, Gemma4UnifiedAudioFeatureExtractor),
    "qwen2_audio": Foreign(
        qwen2_audio, partial(WhisperFeatureExtractor, feature_size=80, chunk_length=1)
    ),
    "voxtral": Foreign(voxtral, partial(WhisperFeatureExtractor, feature_size=80, chunk_length=2)),
    "granite_speech": Foreign(granite_speech, FakeGraniteExtractor),
    "qwen3_asr": Foreign(qwen3_asr, partial(Qwen3ASRFeatureExtractor, feature_size=80)),
    "llama": Foreign(llama, None),
}
HEARING = [name for name, foreign in FOREIGN.items() if foreign.extractor]


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """With weights large enough that every block matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Words of the built-in prompts' kind, a chat's markup, and the token of speech."""
    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<turn>", *WORDS]
    words += [f"w{i}" for i in range(SPEECH - len(words))]
    words += ["<|audio|>", "<boa>", "<eoa>", "<unk>"]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer = Whitespace()
    marks = ["<user>", "<assistant>", "<turn>", "<|audio|>", "<boa>", "<eoa>"]
    made.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"boa_token": "<boa>", "eoa_token": "<eoa>"},
    )
    if chat:
        fast.chat_template = _CHAT
    return fast


_CHAT = (
    "<s>{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}"
    "{% if part.type == 'audio' %}<|audio|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def foreign_listener(name: str) -> Listener:
    """A model of this class with its own feature extractor, in float32."""
    torch.manual_seed(0)
    model, extractor = scaled(FOREIGN[name].build()), FOREIGN[name].extractor
    assert extractor is not None
    processor = OtherProcessor(extractor(), tokenizer(), LISTENING[name], anatomy(model))
    model.generation_config = token_ids_only(model.generation_config)
    model.generation_config.eos_token_id = processor.end_id
    return Listener(model, processor)


def prompts(name: str, waves: list[Any]) -> dict[str, Any]:
    """Beginning, speech, and words behind it, padded on the left."""
    extractor = FOREIGN[name].extractor
    audio, counts = LISTENING[name].hear(extractor(), waves) if extractor else ({}, [0, 0])
    rows = [[BOS, *[SPEECH] * n, *(5 + i % 7 for i in range(4 + k))] for k, n in enumerate(counts)]
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **audio}


def positions_of(inputs: dict[str, Any]) -> torch.Tensor:
    """As generate numbers them, (B, S)."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
