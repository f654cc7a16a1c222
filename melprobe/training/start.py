"""What a run starts from: another checkpoint's weights, and which parts may change."""

from pathlib import Path

from torch import Tensor

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks
from melprobe.model import checkpoint, phi4
from melprobe.model.adapter import ADAPTER, adapter_state, load_adapter_state, read_adapter
from melprobe.model.ancestry import Ancestor, Gift, read_ancestors
from melprobe.model.base import base_sha256, resolve_base
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.training.recipe import Lora, Model
from melprobe.wheels import file_sha256


def take_over(model: MelLLMForConditionalGeneration, settings: Model) -> list[Ancestor]:
    """Copy what `settings` wants from other checkpoints into `model`, and hold what is to stay.

    Returns what it owes to whom. UsageError for a checkpoint that doesn't fit.
    """
    ancestors: list[Ancestor] = []
    if settings.init:
        folder = _adapter_folder(settings.init, "model.init", model)
        load_adapter_state(model, read_adapter(folder), f"model.init {folder}")
        ancestors = inherited(folder, "front and adapter")
    if settings.lora and settings.lora.init:
        found, ancestors = _adapter(settings.lora.init, settings.lora, model)
        front = {name: t for name, t in adapter_state(model).items() if "lora_" not in name}
        load_adapter_state(model, front | found, f"model.lora.init {settings.lora.init}")
    if settings.lora and settings.lora.held:
        blocks = decoder_blocks(model)
        for layer in check_layers(settings.lora.held, len(blocks)):
            blocks[layer].requires_grad_(False)
    return ancestors


def inherited(folder: Path, gave: Gift) -> list[Ancestor]:
    """What a checkpoint owes to one that gave it something, and to those before."""
    sha256 = file_sha256(checkpoint.weights_file(folder))
    return [Ancestor(str(folder), sha256, gave), *read_ancestors(folder)]


def _adapter(
    name: str, lora: Lora, model: MelLLMForConditionalGeneration
) -> tuple[dict[str, Tensor], list[Ancestor]]:
    """LoRA tensors of a checkpoint or of a Phi-4-multimodal, and what is owed for them."""
    folder = resolve_base(name) if name == model.config.base else Path(name).expanduser()
    if not (folder / "config.json").is_file() or not phi4.is_phi4(folder):
        folder = _adapter_folder(name, "model.lora.init", model)
        found = {name: t for name, t in read_adapter(folder).items() if "lora_" in name}
        return found, inherited(folder, "adapter")
    if name != model.config.base:
        _check_base(base_sha256(folder), f"model.lora.init {folder}", model)
    speech, asked = phi4.read_speech_lora(folder), lora.to_peft()
    theirs = (speech.rank, speech.alpha, ", ".join(sorted(speech.targets)))
    ours = (asked.r, float(asked.lora_alpha), ", ".join(sorted(lora.targets)))
    if theirs != ours:
        raise UsageError(
            "model.lora.init {}: its speech LoRA has rank {}, alpha {:g} and targets {}; the "
            "recipe's has rank {}, alpha {:g} and targets {}".format(name, *theirs, *ours)
        )
    found = {
        f"language_model.model.{at}.default.weight": tensor for at, tensor in speech.tensors.items()
    }
    return found, [Ancestor(name, file_sha256(folder / phi4.SPEECH_LORA), "adapter")]


def _adapter_folder(name: str, field: str, model: MelLLMForConditionalGeneration) -> Path:
    folder = checkpoint.find_checkpoint(name)
    if not (folder / ADAPTER).is_file():
        raise UsageError(f"{field} {folder}: tuned whole; take one with an adapter")
    _check_base(checkpoint.read_config(folder).base_sha256, f"{field} {folder}", model)
    return folder


def _check_base(sha256: str, where: str, model: MelLLMForConditionalGeneration) -> None:
    if sha256 != model.config.base_sha256:
        raise UsageError(
            f"{where}: its base's weights hash to {sha256[:12]}, and this recipe's, "
            f"{model.config.base}, to {model.config.base_sha256[:12]}; take one base"
        )
