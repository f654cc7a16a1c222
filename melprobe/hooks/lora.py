"""Switching a trained LoRA adapter off, block by block and position by position.

What works on such a position is then the base model's block. This is not the paper's freezing,
which trains without LoRA in some blocks from the start: there the other blocks can make up for it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks
from melprobe.hooks.positions import PositionTracker


@contextmanager
def without_lora(
    model: PreTrainedModel, layers: Iterable[int], positions: str = "all"
) -> Iterator[None]:
    """Run these blocks on the base model's weights at these positions inside a `with`.

    Restored on any exit. Raises UsageError for a layer that isn't there, for one without LoRA, or
    whose LoRA has been folded into its weights (`melprobe.load(..., merge=False)` keeps it apart),
    and for positions that there are not.
    """
    blocks = decoder_blocks(model)
    adapters: list[Any] = []  # modules, by their other base
    for layer in check_layers(layers, len(blocks)):
        found = [module for module in blocks[layer].modules() if isinstance(module, LoraLayer)]
        if not found:
            raise UsageError(
                f"block {layer} has no LoRA to switch off, or it was folded in when the checkpoint "
                "was loaded: load it with merge=False"
            )
        adapters += found

    def base(adapter: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        where = tracker.selected(positions)[:, -output.shape[1] :, None]
        return torch.where(where, adapter.base_layer(*args), output)

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for adapter in adapters:
            stack.callback(adapter.register_forward_hook(base, prepend=True).remove)
        yield


@torch.no_grad()
def adapter_sizes(model: PreTrainedModel) -> list[float]:
    """‖ΔW‖ / ‖W‖ of each block, over all matrices that have an adapter; 0 where none has.

    A block whose adapter is nothing is the base's, and as such alike in all models over it. The
    adapter has to be apart (`merge=False`).
    """
    sizes = []
    for block in decoder_blocks(model):
        layers: list[Any] = [module for module in block.modules() if isinstance(module, LoraLayer)]
        change = sum(
            layer.get_delta_weight(name).square().sum().item()
            for layer in layers
            for name in layer.active_adapters
        )
        whole = sum(layer.get_base_layer().weight.square().sum().item() for layer in layers)
        sizes.append((change / whole) ** 0.5 if whole else 0.0)
    return sizes
