"""What a model's work takes in memory, beside its weights."""

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.autograd.profiler import profile


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
