"""LoRA in a Mel-LLM's decoder: put in, taken out as tensors, folded into the weights.

It knows nothing of checkpoint folders beyond the one file that holds an adapter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks

if TYPE_CHECKING:
    from melprobe.model.modelling import MelLLMForConditionalGeneration

ADAPTER = "adapter.safetensors"


def add_lora(model: "MelLLMForConditionalGeneration", lora: LoraConfig) -> None:
    """Put a LoRA adapter into the language model in place and freeze the rest of it.

    Raises UsageError for a block or a linear layer that the model doesn't have.
    """
    _check_lora(decoder_blocks(model), lora)
    inject_adapter_in_model(lora, model.language_model)
    for name, parameter in model.language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.lora_config = lora


def _check_lora(blocks: nn.ModuleList, lora: LoraConfig) -> None:
    """PEFT passes over what it doesn't find, and takes an empty list of layers for all of them."""
    layers, targets = lora.layers_to_transform, lora.target_modules or ()
    if layers is None:
        layers = range(len(blocks))
    elif isinstance(layers, int):
        layers = [layers]
    if not layers:
        last = len(blocks) - 1
        raise UsageError(f"lora.layers is empty: name some of 0 to {last}, or leave it out for all")
    linears = {
        f".{name}"
        for layer in check_layers(layers, len(blocks))
        for name, module in blocks[layer].named_modules()
        if isinstance(module, nn.Linear)
    }
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        if not any(name.endswith(f".{target}") for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UsageError(f"lora.targets {target!r}: linear layers of these blocks are {known}")


def adapter_state(model: "MelLLMForConditionalGeneration") -> dict[str, Tensor]:
    """What speech training adds to the base: audio front and LoRA tensors, by name.

    An encoder that hears as it was trained stays where it is, as the base does.
    """
    encoder = "audio_front.encoder." if model.config.encoder else None
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ("lora_" in name or name.startswith("audio_front."))
        and not (encoder and name.startswith(encoder))
    }


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The saved tensors of an adapter checkpoint."""
    try:
        return load_file(folder / ADAPTER)
    except SafetensorError as error:
        raise UsageError(f"{folder / ADAPTER}: damaged ({error}); fetch it again") from None


def load_adapter_state(
    model: "MelLLMForConditionalGeneration", state: dict[str, Tensor], where: str
) -> None:
    """Copy a saved adapter into `model`, or say which tensors don't fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(expected.items() ^ found.items()):
        listed = ", ".join(f"{name} {shape}" for name, shape in wrong[:4])
        raise UsageError(
            f"{where}: {len(wrong)} tensors missing, left over or misshapen: {listed} …; its "
            "weights and its config are of different checkpoints, so fetch both again"
        )
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def merge_lora(model: "MelLLMForConditionalGeneration") -> None:
    """Fold every adapter into its base weight in place, so that inference pays nothing for it."""
    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.language_model.get_submodule(parent), child, module.get_base_layer())
    del model.lora_config


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, one of `model`'s, as if LoRA had been folded into the weights: W + scale · B A."""
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if "lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = merged[f"{name}.weight"]
            for adapter, scale in module.scaling.items():
                a, b = (state[f"{name}.lora_{which}.{adapter}.weight"].float() for which in "AB")
                weight = (weight.float() + scale * b @ a).to(weight.dtype)
            merged[f"{name}.weight"] = weight
    return merged
