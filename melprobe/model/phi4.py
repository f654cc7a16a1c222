"""Phi-4-multimodal (arXiv 2503.01743) taken apart: text decoder, audio encoder, speech LoRA.

On the hub its tensors have the names of the code that lies beside them (`phi4mm`); transformers
writes its own (`phi4_multimodal`). Both are read here, and none of the hub's code is run. Tested on
tiny random models of the class, never on the real weights.
"""

import re
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalAudioModel,
    Phi4MultimodalConfig,
)

from melprobe.errors import UsageError
from melprobe.model.base import read_json

HUB_ID = "microsoft/Phi-4-multimodal-instruct"
SPEECH_LORA = Path("speech-lora", "adapter_model.safetensors")
TRANSCRIBE = ("<|user|>", "Transcribe the audio clip into text.<|end|><|assistant|>")
"""What stands before and after the audio."""
_PUBLISHED_LORA = {
    "rank": 320,
    "alpha": 640.0,
    "targets": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}

_DECODER = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_AUDIO = "model.embed_tokens_extend.audio_embed."
_NORMALISATION = "encoder_embedding."
# The hub's names to transformers'.
_RENAMED = (
    (r"\.base_layer\.", "."),  # the hub has both adapters wrapped around the decoder's layers
    (r"\.feed_forward_(in|out)\.net\.0\.linear\.", r".feed_forward_\1.gate_up_proj."),
    (r"\.feed_forward_(in|out)\.net\.2\.", r".feed_forward_\1.down_proj."),
    (r"\.self_attn\.linear_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
    (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
)
_RENAMED_SETTINGS = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
}


def is_phi4(folder: Path) -> bool:
    """Whether a model folder holds a Phi-4-multimodal, in either layout."""
    kind = read_json(folder / "config.json").get("model_type")
    return kind in {"phi4mm", "phi4_multimodal"}


def is_named(name: str) -> bool:
    """Whether `name` is the hub id of Phi-4-multimodal, or a folder with one."""
    folder = Path(name).expanduser()
    return name == HUB_ID or ((folder / "config.json").is_file() and is_phi4(folder))


def load_decoder(folder: Path, attention: str | None = None) -> Phi3ForCausalLM:
    """Its text decoder in float32, which is a Phi-3; UsageError when tensors don't fit."""
    fields = read_json(folder / "config.json")
    known = {*Phi3Config.__annotations__, "rope_scaling", "rope_theta", "partial_rotary_factor"}
    config = Phi3Config(**{name: fields[name] for name in known & fields.keys()})
    state = _tensors(folder, *_DECODER)
    with torch.device("meta"):
        shape = Phi3ForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _check(shape, state, f"{folder}: text decoder", but=tied)
    model = Phi3ForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation=attention
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def audio_config(folder: Path) -> Phi4MultimodalAudioConfig:
    """Of its audio encoder; UsageError for one that streams or stacks what it hears."""
    path = folder / "config.json"
    fields = read_json(path)
    try:
        made = fields["audio_config"] if "audio_config" in fields else _hub_settings(fields)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged (no {error} of its audio encoder)") from None
    config = Phi4MultimodalAudioConfig(**made)
    if (config.chunk_size, config.downsample_rate) != (-1, 1):
        raise UsageError(
            f"{path}: chunk_size {config.chunk_size} and downsample_rate {config.downsample_rate} "
            "of its audio encoder; -1 and 1 are all that is known here"
        )
    return config


def _hub_settings(fields: dict[str, Any]) -> dict[str, Any]:
    found = fields["audio_processor"]["config"]
    made = {_RENAMED_SETTINGS.get(name, name): value for name, value in found.items()}
    made = {n: made[n] for n in Phi4MultimodalAudioConfig.__annotations__.keys() & made.keys()}
    made["nemo_conv_channels"] = found["nemo_conv_settings"]["conv_channels"]
    made["bias_max_distance"] = found["relative_attention_bias_args"]["t5_bias_max_distance"]
    made["downsample_rate"] = fields["embd_layer"]["audio_embd_layer"]["downsample_rate"]
    return made


def published_text_config() -> Phi3Config:
    """The decoder of `HUB_ID`, whose shapes are the defaults of transformers' class."""
    fields = Phi4MultimodalConfig().to_dict()
    shapes = {name: fields[name] for name in Phi3Config.__annotations__ if name in fields}
    return Phi3Config(**shapes | {"tie_word_embeddings": True})


def published_audio_config(conformer: bool) -> Phi4MultimodalAudioConfig:
    """Likewise, of its audio encoder."""
    return Phi4MultimodalAudioConfig() if conformer else Phi4MultimodalAudioConfig(num_blocks=0)


def audio_encoder(config: Phi4MultimodalAudioConfig) -> Phi4MultimodalAudioModel:
    """A fresh audio encoder, all but its normalisation, which is the feature extractor's work."""
    encoder = Phi4MultimodalAudioModel(config)
    del encoder.encoder_embedding
    if not config.num_blocks:
        del encoder.relative_attention_bias_layer
    return encoder


def load_audio_encoder(folder: Path, config: Phi4MultimodalAudioConfig) -> Phi4MultimodalAudioModel:
    """The trained one, of as many Conformer blocks as `config` has: all, or none."""
    parts = ("embed.", "encoders.", "relative_attention_bias_layer.")
    wanted = parts if config.num_blocks else parts[:1]
    found = _audio(folder, "encoder.").items()
    state = {name: tensor for name, tensor in found if name.startswith(wanted)}
    encoder = audio_encoder(config)
    _fill(encoder, state, f"{folder}: audio encoder")
    return encoder


def load_projection(folder: Path, front: nn.Module) -> None:
    """Fill `front.projection` with the one by which speech gets into its decoder."""
    state = {
        f"{at}.{kind}": tensor
        for at, name in ((0, "up"), (2, "down"))
        for kind, tensor in _audio(folder, f"{name}_proj_for_speech.").items()
    }
    _fill(front.get_submodule("projection"), state, f"{folder}: speech projection")


def mel_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each mel bin by which its audio encoder normalises."""
    found = _audio(folder, f"encoder.{_NORMALISATION}")
    if found.keys() != {"global_mean", "global_invstd"}:
        raise UsageError(f"{folder}: it lacks the means and deviations of its mel bins")
    return found["global_mean"].tolist(), found["global_invstd"].double().reciprocal().tolist()


class SpeechLora(NamedTuple):
    """The LoRA that was trained for speech."""

    rank: int
    alpha: float
    targets: set[str]
    tensors: dict[str, Tensor]
    """by names like `layers.0.self_attn.qkv_proj.lora_A`"""


def lora_settings(name: str) -> dict[str, Any]:
    """Rank, alpha and targets of its speech LoRA; those of `HUB_ID` are known."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return dict(_PUBLISHED_LORA)
    speech = read_speech_lora(folder)
    return {"rank": speech.rank, "alpha": speech.alpha, "targets": tuple(sorted(speech.targets))}


def read_speech_lora(folder: Path) -> SpeechLora:
    """Out of `speech-lora`, as PEFT writes it; UsageError where there is none, or another kind."""
    path = folder / SPEECH_LORA
    if not path.is_file():
        raise UsageError(f"{path}: missing, and Phi-4-multimodal keeps its speech LoRA there")
    settings = read_json(path.parent / "adapter_config.json")
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        found = load_file(path)
    except (KeyError, SafetensorError) as error:
        raise UsageError(f"{path.parent}: damaged ({error}); fetch it again") from None
    if settings.get("use_rslora"):
        raise UsageError(f"{path.parent}: rank-stabilised LoRA, whose scale is another")
    tensors, targets = {}, set()
    for name, tensor in found.items():
        match = re.search(r"(layers\.\d+\.\w+\.(\w+)\.lora_[AB])(\.\w+)?\.weight$", name)
        if not match:
            raise UsageError(f"{path}: {name} is no LoRA matrix of a decoder block")
        tensors[match[1]] = tensor
        targets.add(match[2])
    return SpeechLora(rank, alpha, targets, tensors)


def _tensors(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """Those whose names in transformers begin with one of the prefixes; LoRA is none of them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    ours = _transformers_name(name)
                    if ours.startswith(prefixes) and "lora_" not in name:
                        found[ours] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise UsageError(f"{file}: damaged ({error}); fetch it again") from None
    return found


def _transformers_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _audio(folder: Path, prefix: str) -> dict[str, Tensor]:
    prefix = _AUDIO + prefix
    return {n.removeprefix(prefix): t for n, t in _tensors(folder, prefix).items()}


def _fill(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    _check(module, state, what)
    module.load_state_dict(state)


def _check(
    module: nn.Module, state: dict[str, Tensor], what: str, but: Set[str] = frozenset()
) -> None:
    """UsageError unless `state` is all that `module` holds, whatever names in `but` there are."""
    expected, found = (
        {(name, tuple(tensor.shape)) for name, tensor in tensors.items() if name not in but}
        for tensors in (module.state_dict(), state)
    )
    if wrong := sorted(expected ^ found):
        name, shape = wrong[0]
        raise UsageError(
            f"{what}: {len(wrong)} tensors missing, left over or misshapen: {name} {shape} …"
        )
