"""Floors for probes: the same model before speech training, or before any.

What a probe reads from these comes from the architecture, the base's text or the mel patches
themselves, not from what the model learned of speech.
"""

from typing import Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from melprobe.model.modelling import MelLLMForConditionalGeneration

Untrained = Literal["front", "all"]
UNTRAINED: tuple[Untrained, ...] = get_args(Untrained)
"""`front`: the base as it is behind a projection drawn anew; `all`: every weight is drawn anew."""


@torch.no_grad()
def untrain(model: MelLLMForConditionalGeneration, what: Untrained, seed: int) -> None:
    """Undo training in place; LoRA, which must not be folded in, is switched off.

    Matrices are drawn from a normal distribution of the configuration's `initializer_range`, norms
    are ones and biases zero, as most decoders start. An encoder's weights stay for `front`.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.lora_B.values():
                adapter.weight.zero_()
    front = model.audio_front
    root: nn.Module = model if what == "all" else getattr(front, "projection", front)
    spread = model.config.text_config.initializer_range
    for name, weight in root.named_parameters():
        if "lora_" in name:
            continue
        if weight.ndim > 1:
            drawn = torch.randn(weight.shape, generator=generator) * spread
            weight.copy_(drawn.to(weight))
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
