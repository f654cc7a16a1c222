"""What a run starts from: another checkpoint's weights, and which parts may change."""

from pathlib import Path

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks
from melprobe.model import checkpoint
from melprobe.model.adapter import ADAPTER, adapter_state, load_adapter_state, read_adapter
from melprobe.model.ancestry import Ancestor, Gift, read_ancestors
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.training.recipe import Model
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
        folder = _adapter_folder(settings.lora.init, "model.lora.init", model)
        found = {name: t for name, t in read_adapter(folder).items() if "lora_" in name}
        front = {name: t for name, t in adapter_state(model).items() if "lora_" not in name}
        load_adapter_state(model, front | found, f"model.lora.init {folder}")
        ancestors = inherited(folder, "adapter")
    if settings.lora and settings.lora.held:
        blocks = decoder_blocks(model)
        for layer in check_layers(settings.lora.held, len(blocks)):
            blocks[layer].requires_grad_(False)
    return ancestors


def inherited(folder: Path, gave: Gift) -> list[Ancestor]:
    """What a checkpoint owes to one that gave it something, and to those before."""
    sha256 = file_sha256(checkpoint.weights_file(folder))
    return [Ancestor(str(folder), sha256, gave), *read_ancestors(folder)]


def _adapter_folder(name: str, field: str, model: MelLLMForConditionalGeneration) -> Path:
    folder = checkpoint.find_checkpoint(name)
    if not (folder / ADAPTER).is_file():
        raise UsageError(f"{field} {folder}: tuned whole; take one with an adapter")
    base = checkpoint.read_config(folder).base_sha256
    if base != model.config.base_sha256:
        raise UsageError(
            f"{field} {folder}: its base's weights hash to {base[:12]}, and this recipe's, "
            f"{model.config.base}, to {model.config.base_sha256[:12]}; take one base"
        )
    return folder
