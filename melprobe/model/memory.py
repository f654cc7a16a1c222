"""What a model's work takes in memory, beside its weights."""

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler import profile
from transformers import PreTrainedModel

from melprobe.hooks.anatomy import anatomy


def peak_bytes(model: torch.nn.Module, work: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU that live at once at most while `work()` runs, with the weights.

    Keys, values and activations, as torch's allocator hands them out: the same number each time,
    and the same measure as `torch.cuda.max_memory_allocated`. The process' own peak would not do,
    since freed memory stays with it and a smaller model could never show. Scratch space of
    libraries below torch is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr
    with profile(profile_memory=True) as seen:
        work()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = accumulate(event.nbytes() for event in events)
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in tensors) + max(live, default=0)


# Bytes of a 10 ms frame in a spectrogram's making: window, complex spectrum and power, in float32.
_FRAME = 400 * 4 * 2 + 257 * (8 + 4)


def study_bytes(
    model: PreTrainedModel, positions: int, answer_tokens: int, *, gradients: bool = False
) -> int:
    """How many bytes one clip takes in a layer study's batch at most, roughly, weights apart.

    positions: of its prompt, reference and draft; answer_tokens: of both answers. Counted: the
    residuals and the cache of the intact run and of the run with swapped audio, one more cache and
    a block's activations for the variant that runs, logits, which a study keeps in float32, and
    the spectrogram, which is as large as a small model's residuals. gradients: and what the blocks
    keep for a backward pass (norms, projections, the MLP's products), which attribution makes.
    """
    config = model.config.get_text_config()
    width, blocks, size = config.hidden_size, config.num_hidden_layers, model.dtype.itemsize
    # Gemma 4's blocks differ in their heads.
    layers = list(getattr(config, "per_layer_config", None) or [config] * blocks)
    residuals = (blocks + 1) * width
    cache = sum(_keys_and_values(layer) for layer in layers)
    # OPT has another name for it.
    widest = max(getattr(layer, "intermediate_size", 4 * width) for layer in layers)
    block = 4 * width + 3 * widest
    if gradients:
        block += blocks * (8 * width + 4 * max(layer.intermediate_size for layer in layers))
    masks = positions  # a byte for each pair of positions
    per_position = size * (2 * residuals + 3 * cache + block) + masks
    per_token = config.vocab_size * (2 * size + 3 * torch.float32.itemsize)
    seconds = anatomy(model).seconds  # nan for a model that only reads
    per_position += int(100 * seconds * _FRAME) if seconds > 0 else 0
    return positions * per_position + answer_tokens * per_token


def _keys_and_values(config: Any) -> int:
    """Numbers that a block of this config leaves in the cache for a position."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head


def default_budget_mb(model: PreTrainedModel) -> int:
    """Half of what a GPU has free, and 2 GB on a CPU."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return max(1, free // 2_000_000)
    return 2000
