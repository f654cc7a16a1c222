"""Making, saving and strictly loading Mel-LLM checkpoints.

A checkpoint is a folder of safetensors and JSON. Trained ones hold the audio front and the LoRA
adapter only; they name their base model and the hash of its weights, and refuse another base.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from melprobe.errors import UsageError
from melprobe.model import phi4
from melprobe.model.adapter import (
    ADAPTER,
    adapter_state,
    add_lora,
    load_adapter_state,
    merge_lora,
    read_adapter,
)
from melprobe.model.base import base_sha256, read_json, resolve_base
from melprobe.model.config import MelLLMConfig, token_ids_only
from melprobe.model.encoder import (
    EncoderStart,
    encoder_config,
    frozen_encoder,
    load_encoder,
    resolve_encoder,
)
from melprobe.model.front import match_scale
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.processor import MelLLMFeatureExtractor, MelLLMProcessor

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
DEFAULT = "mel-smol"
SETTINGS = "melprobe.json"


def create(
    base: str,
    feature_extractor: MelLLMFeatureExtractor,
    *,
    prompt: tuple[str, str] = ("", ""),
    lora: LoraConfig | None = None,
    encoder: EncoderStart | None = None,
    **config: Any,
) -> tuple[MelLLMForConditionalGeneration, MelLLMProcessor]:
    """A fresh Mel-LLM over a base language model, with a new audio front and a new adapter.

    base: a language model, or a Phi-4-multimodal, which gives its text decoder. encoder: of the
    `whisper` and `phi4` fronts; a `phi4` front over its own decoder has the trained projection
    too. config: the audio fields of `MelLLMConfig`. With an adapter (`lora`) the base is frozen.
    """
    folder = resolve_base(base)
    language_model = _load_base(folder)
    language_model.config.name_or_path = ""  # a path of this machine; `base` is the name
    sha256 = base_sha256(folder)
    if encoder:
        heard = resolve_encoder(encoder.name)
        front = config.get("audio_front", "whisper")
        config["encoder_config"] = encoder_config(heard, front, encoder.conformer)
        heard_sha256 = sha256 if heard == folder else base_sha256(heard)
        if encoder.stays:
            config |= {"encoder": encoder.name, "encoder_sha256": heard_sha256}
    mel_config = MelLLMConfig(
        text_config=language_model.config,
        n_mels=feature_extractor.feature_size,
        base=base,
        base_sha256=sha256,
        **config,
    )
    processor = MelLLMProcessor(
        feature_extractor,
        _load_tokenizer(folder),
        mel_config.frames_per_patch,
        before=prompt[0],
        after=prompt[1],
    )
    mel_config.audio_token_id = processor.audio_token_id
    with torch.device("meta"):
        model = MelLLMForConditionalGeneration(mel_config)
    model.language_model = language_model
    model.audio_front = type(model.audio_front)(mel_config)
    match_scale(model.audio_front, language_model.get_input_embeddings().weight)
    if encoder:
        if encoder.pretrained:
            model.audio_front.encoder = load_encoder(heard, mel_config.encoder_config)
            if front == "phi4" and heard_sha256 == sha256:  # it leads into this decoder
                phi4.load_projection(heard, model.audio_front)
        if not encoder.trained:
            model.audio_front.encoder.requires_grad_(False)
    model.generation_config = token_ids_only(language_model.generation_config)
    if lora:
        add_lora(model, lora)
    return model, processor


def _load_base(folder: Path, attention: str | None = None) -> PreTrainedModel:
    if phi4.is_phi4(folder):
        return phi4.load_decoder(folder, attention)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )


def _load_tokenizer(folder: Path) -> Any:
    if phi4.is_phi4(folder):
        # The hub's folder names code of its own, and a class that would split words otherwise.
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def saved_tensors(model: MelLLMForConditionalGeneration) -> dict[str, Tensor]:
    """What `save` writes of a model: front and adapter, or all of one that was tuned whole."""
    return adapter_state(model) if hasattr(model, "lora_config") else model.state_dict()


def save(
    model: MelLLMForConditionalGeneration,
    processor: MelLLMProcessor,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write front and adapter (in `dtype`), config and processor; the base stays where it is.

    A model without an adapter was tuned whole, and is saved whole, as any transformers model.
    tensors: `saved_tensors`, where this process holds only parts of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = saved_tensors(model) if tensors is None else tensors
    if not hasattr(model, "lora_config"):
        with torch.device("meta"):
            kept = type(model)(copy.deepcopy(model.config))
        kept.load_state_dict(tensors, assign=True)
        kept.tie_weights()
        kept.generation_config = model.generation_config
        kept.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    save_file(state, folder / ADAPTER)
    model.config.save_pretrained(folder)
    settings = {
        "feature_extractor": processor.feature_extractor.to_dict(),
        "before": processor.before,
        "after": processor.after,
        "lora": _lora_fields(model.lora_config),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _lora_fields(lora: LoraConfig) -> dict[str, Any]:
    targets, layers = lora.target_modules or (), lora.layers_to_transform
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(targets),
        "layers_to_transform": layers,
    }


def weights_file(folder: Path) -> Path:
    """What a checkpoint's training made: the adapter, or where there is none the whole model."""
    adapter = folder / ADAPTER
    return adapter if adapter.is_file() else folder / "model.safetensors"


def find_checkpoint(name: str) -> Path:
    """A checkpoint folder, by path or by its name under checkpoints/."""
    for folder in (Path(name).expanduser(), CHECKPOINTS / name):
        if weights_file(folder).is_file():
            return folder
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{ADAPTER}"))
    raise UsageError(
        f"no checkpoint {name!r}; there is: {', '.join(shipped) or 'none'} "
        f"(or a folder with {ADAPTER} or model.safetensors)"
    )


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    merge: bool = True,
) -> tuple[MelLLMForConditionalGeneration, MelLLMProcessor]:
    """Model in eval mode and processor of a checkpoint. `merge` folds LoRA into the weights."""
    folder = find_checkpoint(str(name))
    model = load_model(folder, merge=merge, dtype=dtype).to(device)
    return model, load_processor(folder, model.config)


def read_config(folder: Path) -> MelLLMConfig:
    """A checkpoint's configuration; UsageError when it is missing, damaged or another model's."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != MelLLMConfig.model_type:
        raise UsageError(f"{folder / 'config.json'}: this is a {kind} model, not a Mel-LLM")
    return MelLLMConfig.from_pretrained(folder)


def lora_blocks(folder: Path, n_layers: int) -> list[int]:
    """The blocks that a checkpoint's adapter changes; none when it was tuned whole."""
    if not (folder / ADAPTER).is_file():
        return []
    lora = _read_settings(folder)["lora"]
    if lora is None:
        return []
    layers = lora.get("layers_to_transform")
    return list(range(n_layers)) if layers is None else sorted(layers)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / SETTINGS)
    if missing := {"feature_extractor", "before", "after", "lora"} - settings.keys():
        raise UsageError(f"{folder / SETTINGS}: damaged (it lacks {', '.join(sorted(missing))})")
    return settings


def load_processor(folder: Path, config: MelLLMConfig) -> MelLLMProcessor:
    """The checkpoint's processor; beside an adapter, with the base model's tokenizer."""
    if not (folder / ADAPTER).is_file():
        read_json(folder / "processor_config.json")
        return MelLLMProcessor.from_pretrained(folder)
    settings = _read_settings(folder)
    return MelLLMProcessor(
        MelLLMFeatureExtractor(**settings["feature_extractor"]),
        _load_tokenizer(resolve_base(config.base)),
        config.frames_per_patch,
        before=settings["before"],
        after=settings["after"],
    )


def load_model(
    folder: Path,
    *,
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
    config: MelLLMConfig | None = None,
) -> MelLLMForConditionalGeneration:
    """The checkpoint's model in eval mode, on its own base; every tensor must find its place.

    Raises UsageError when the base's weights are not those the adapter was trained on, or when
    tensors are missing or left over. `merge` folds LoRA into the weights, in float32. `dtype` is
    that of the parameters; buffers (rotary frequencies) stay as exact as the decoder makes them.
    """
    config = config or read_config(folder)
    if not (folder / ADAPTER).is_file():
        return _load_whole(folder, dtype)
    settings = _read_settings(folder)
    base = resolve_base(config.base)
    if (found := base_sha256(base)) != config.base_sha256:
        raise UsageError(
            f"{folder}: trained on a {config.base} whose weights hash to "
            f"{config.base_sha256[:12]}, but {base} hashes to {found[:12]}; restore that base"
        )
    attention = config._attn_implementation  # None unless asked for; making the model fills it in
    with torch.device("meta"):
        model = MelLLMForConditionalGeneration(config)
    model.language_model = _load_base(base, attention)
    model.audio_front.to_empty(device="cpu")
    if config.encoder:
        encoder = frozen_encoder(
            config.encoder, config.encoder_sha256, config.encoder_config, str(folder)
        )
        model.audio_front.encoder = encoder.requires_grad_(False)
    model.generation_config = token_ids_only(model.language_model.generation_config)
    add_lora(model, LoraConfig(**settings["lora"]))
    load_adapter_state(model, read_adapter(folder), str(folder))
    if merge:
        merge_lora(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _load_whole(folder: Path, dtype: torch.dtype) -> MelLLMForConditionalGeneration:
    try:
        model, info = super(
            MelLLMForConditionalGeneration, MelLLMForConditionalGeneration
        ).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise UsageError(f"{weights_file(folder)}: damaged ({error}); fetch it again") from None
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise UsageError(f"{folder}: {len(wrong)} tensors missing or left over: {wrong[0]} …")
    return model
