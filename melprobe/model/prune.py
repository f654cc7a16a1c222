"""Models without some blocks, or without speech in the upper ones: not skipped, but gone."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks
from melprobe.model.exit import check_exit
from melprobe.model.modelling import MelLLMForConditionalGeneration


def drop_blocks(model: MelLLMForConditionalGeneration, layers: Iterable[int]) -> None:
    """Take decoder blocks out of `model`, in place; the others close ranks.

    What is left is what skipping these blocks at all positions computes. Raises UsageError as
    `check_droppable` does.
    """
    kept = check_droppable(model, layers)
    blocks, decoder = decoder_blocks(model), cast(Any, model.get_decoder())
    decoder.layers = nn.ModuleList(blocks[place] for place in kept)
    for place, block in enumerate(decoder.layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache
                module.layer_idx = place
    for config in _distinct(model.config.text_config, decoder.config):
        config.num_hidden_layers = len(kept)
        for name, values in list(config.to_dict().items()):  # layer_types, no_rope_layers, ...
            if "layer" in name and isinstance(values, list) and len(values) == len(blocks):
                setattr(config, name, [values[place] for place in kept])


def check_droppable(model: MelLLMForConditionalGeneration, layers: Iterable[int]) -> list[int]:
    """The blocks that stay; UsageError for blocks that aren't there, for all of them, and for a

    model whose LoRA is not folded in, or that speech leaves early.
    """
    _check_unpruned(model)
    if hasattr(model, "lora_config"):
        raise UsageError("a model with LoRA apart can't lose blocks: load it with merge=True")
    n = len(decoder_blocks(model))
    gone = set(check_layers(layers, n))
    if len(gone) == n:
        raise UsageError(f"layers: all {n} blocks would go; leave one")
    return [place for place in range(n) if place not in gone]


def let_speech_exit(model: MelLLMForConditionalGeneration, after: int) -> None:
    """Make speech leave `model` after block `after`, in place; see `melprobe.model.exit`.

    What is left is what skipping the blocks above at speech positions computes. Raises UsageError
    as `check_exitable` does.
    """
    check_exitable(model, after)
    model.config.speech_exit = after


def check_exitable(model: MelLLMForConditionalGeneration, after: int) -> None:
    """UsageError for a block or a decoder that speech can't leave after, or has left already."""
    _check_unpruned(model)
    check_exit(model, after)


def _check_unpruned(model: MelLLMForConditionalGeneration) -> None:
    if (last := model.config.speech_exit) is not None:
        raise UsageError(
            f"speech leaves this model after block {last} already: prune the one it was made from"
        )


def _distinct(*configs: Any) -> list[Any]:
    return list({id(config): config for config in configs}.values())
