"""Switching a trained LoRA adapter off, block by block.

What is left of such a block is the base model's. This is not the paper's freezing, which trains
without LoRA in some blocks from the start: there the other blocks can make up for it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks


@contextmanager
def without_lora(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Run these blocks on the base model's weights inside a `with`; restored on any exit.

    Raises UsageError for a layer that isn't there, and for one without LoRA, or whose LoRA has been
    folded into its weights (`melprobe.load(..., merge=False)` keeps it apart).
    """
    blocks = decoder_blocks(model)
    adapters: list[LoraLayer] = []
    for layer in check_layers(layers, len(blocks)):
        found = [module for module in blocks[layer].modules() if isinstance(module, LoraLayer)]
        if not found:
            raise UsageError(
                f"block {layer} has no LoRA to switch off, or it was folded in when the checkpoint "
                "was loaded: load it with merge=False"
            )
        adapters += found
    # Not `enable_adapters`: that also decides which weights are trained.
    was = [adapter.disable_adapters for adapter in adapters]
    for adapter in adapters:
        adapter._disable_adapters = True
    try:
        yield
    finally:
        for adapter, state in zip(adapters, was, strict=True):
            adapter._disable_adapters = state
