"""A Mel-LLM small enough to make in a test: four blocks, random weights, its own tokenizer."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from melprobe.listener import Listener
from melprobe.model.config import MelLLMConfig
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMFeatureExtractor, MelLLMProcessor
from melprobe.training.text import train_tokenizer

WORDS = [
    "the",
    "press",
    "call",
    "message",
    "number",
    "one",
    "three",
    "please",
    "hold",
    "new",
    "other",
    "your",
]
N_LAYERS = 4


def tiny_config(**fields: object) -> MelLLMConfig:
    text_config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large enough that every block matters
    )
    return MelLLMConfig(text_config=text_config, **fields)


def tiny_listener(seed: int = 0, **fields: object) -> Listener:
    """A listener over `tiny_config(**fields)` in float32."""
    torch.manual_seed(seed)
    config = tiny_config(**fields)
    processor = MelLLMProcessor(
        MelLLMFeatureExtractor(),
        train_tokenizer([" ".join(WORDS)], 300),
        config.frames_per_patch,
        after="<|answer|>",
    )
    config.audio_token_id = processor.audio_token_id
    model = MelLLMForConditionalGeneration(config).eval()
    torch.nn.init.normal_(_last_linear(model).weight, std=0.05)
    return Listener(model, processor)


def _last_linear(model: MelLLMForConditionalGeneration) -> torch.nn.Linear:
    return [m for m in model.audio_front.modules() if isinstance(m, torch.nn.Linear)][-1]


def waves(*seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Noise of these lengths with a slowly changing level."""
    rng = np.random.default_rng(seed)
    found = []
    for s in seconds:
        n = int(16_000 * s)
        level = 0.1 + 0.09 * np.sin(np.linspace(0, 9 * s, n) + rng.uniform(0, 6))
        found.append((rng.standard_normal(n) * level).astype(np.float32))
    return found


def without_layer(listener: Listener, layer: int) -> Listener:
    """The same model rebuilt with one block fewer."""
    model, config = listener.model, tiny_config()
    config.update({k: v for k, v in model.config.to_dict().items() if k != "text_config"})
    config.text_config.num_hidden_layers = N_LAYERS - 1
    rebuilt = MelLLMForConditionalGeneration(config)
    rebuilt.language_model = LlamaForCausalLM(config.text_config)
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            index = int(parts[at])
            if index == layer:
                continue
            parts[at] = str(index - (index > layer))
        state[".".join(parts)] = tensor
    rebuilt.load_state_dict(state, strict=True)
    return Listener(rebuilt.eval(), listener.processor)
