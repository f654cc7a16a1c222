"""A Mel-LLM small enough to make in a test: four blocks, random weights, its own tokenizer."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from melprobe.corpus.manifest import Utterance, read_manifest, write_manifest
from melprobe.listener import Listener
from melprobe.model import checkpoint
from melprobe.model.ancestry import write_ancestors
from melprobe.model.config import MelLLMConfig
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMFeatureExtractor, MelLLMProcessor
from melprobe.training.recipe import Corpus, Data, Lora, SpeechRecipe, Stage
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
TEXTS = ["please hold", "the new number three", "one"]
N_CLIPS = 6


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


def log_probs(listener: Listener, clips: list[np.ndarray]) -> torch.Tensor:
    """Log-probabilities at the answers `TEXTS`, (N, V)."""
    return listener.score(clips, TEXTS).log_probs


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


def tiny_checkpoint(place: Path) -> None:
    """A checkpoint with an adapter of noise in `model`, and beside it manifests of noise and texts.

    `data.jsonl` holds all clips. Of the two in `train.jsonl`, `dev.jsonl` holds the second.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config().text_config).save_pretrained(place / "base")
    lm = tiny_listener()
    lm.processor.tokenizer.save_pretrained(place / "base")
    model, processor = checkpoint.create(
        str(place / "base"),
        lm.processor.feature_extractor,
        prompt=("", "<|answer|>"),
        lora=Lora(rank=2).to_peft(),
    )
    torch.nn.init.normal_(model.audio_front.projection.weight, std=0.05)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            torch.nn.init.normal_(weight, std=0.2)
    checkpoint.save(model, processor, place / "model")
    utterances = tiny_manifest(place / "data.jsonl")
    write_manifest(place / "train.jsonl", [utterances[0], utterances[3]])
    write_manifest(place / "dev.jsonl", [utterances[3]])
    corpus = Corpus(manifest=str(place / "train.jsonl"))
    data = Data(train=(corpus,), dev=(str(place / "dev.jsonl"),), stages=(Stage(steps=1),))
    recipe = SpeechRecipe(out=place / "run", data=data)
    (place / "model" / "recipe.json").write_text(recipe.model_dump_json())
    (place / "model" / "data.json").write_text(json.dumps({"manifests": [corpus.model_dump()]}))
    write_ancestors(place / "model", [])


def tiny_manifest(path: Path) -> list[Utterance]:
    """Clips of noise with texts, beside the manifest."""
    place, utterances = path.parent, []
    for i, wave in enumerate(waves(*np.linspace(0.4, 0.9, N_CLIPS))):
        clip = place / f"{i}.flac"
        soundfile.write(clip, wave, 16_000)
        text = f"{WORDS[i]} {WORDS[i + 1]} please"
        utterances.append(Utterance(clip.name, clip, text, len(wave) / 16_000, "noise"))
    write_manifest(path, utterances)
    return utterances


def split_clips(folder: Path, place: Path) -> None:
    """The clips of `folder`'s manifest, four to train on and the rest to watch, by `place`'s."""
    clips = read_manifest(folder / "data.jsonl")
    write_manifest(place / "train.jsonl", clips[:4])
    write_manifest(place / "dev.jsonl", clips[4:])
