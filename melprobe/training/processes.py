"""Several processes that train one model, each on its share of every batch.

Either every process holds the whole model (DistributedDataParallel), or its part of each tensor
(FSDP2), which is put together block by block while it is needed. Tensors that are held in parts are
`DTensor`s; whoever needs one whole asks all processes at once.

Batch number n holds the same clips, changed in the same ways, however many processes there are, so
that a run may go on with another number of them. Losses are means over tokens, patches or clips, of
which the shares hold unlike numbers: each process divides its own sum by the number in all shares,
so that gradients, averaged over processes, are those of one process that had the whole batch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.training.recipe import Parallel

# The others wait for the first while it writes.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process has."""

    rank: int = 0
    processes: int = 1

    def places(self, count: int) -> list[int]:
        """In a batch of `count`; the first for an idle process, which has to run something."""
        return list(range(self.rank, count, self.processes)) or [0]

    def idle(self, count: int) -> bool:
        """Whether a batch of `count` has nothing for it, so that what it runs must not count."""
        return self.rank >= count


WHOLE = Share()
"""That of a single process."""


class Mean(Protocol):
    """A mean from this process' sum and number of terms; 0 of none."""

    def __call__(self, total: Tensor, count: Tensor | int) -> Tensor: ...


def own_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """Over what this process has."""
    return total / torch.as_tensor(count).clamp(min=1)


def shared_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """What averaged over the processes is the mean over what all of them have."""
    everyone = torch.as_tensor(count, dtype=torch.float32).to(total.device, copy=True)
    distributed.all_reduce(everyone)
    return total * distributed.get_world_size() / everyone.clamp(min=1)


def idle_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """`shared_mean` of a process whose share is empty."""
    return shared_mean(total * 0, 0)


def answer_loss(model: Any, batch: Mapping[str, Tensor], mean: Mean) -> Tensor:
    """Nat per labelled token of a language model's batch."""
    labelled = (batch["labels"][:, 1:] != -100).sum()
    return mean(model(**batch).loss * labelled, labelled)


class Losses(nn.Module):
    """What `task` minimises in a step, as one module over all that learns."""

    def __init__(self, task: Any, share: Share):
        super().__init__()
        self.model, self.heads = task.model, task.heads
        self.task = task
        self.share = share

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        mean: Mean = own_mean if self.share.processes == 1 else shared_mean
        if "idle" in batch:
            del batch["idle"]
            mean = idle_mean
        return self.task.losses(self.model, batch, step, mean)

    def evaluate(self, step: int) -> dict[str, float]:
        """The task's measures, the same in all processes, which must all take part."""
        return self.task.evaluate(step)


def make_accelerator(device: torch.device, *, bf16: bool, accumulate: int) -> Accelerator:
    """On all processes that torchrun started; UsageError where it does not find them."""
    # Accelerate keeps one state a process, which would refuse a second run (a notebook's) on
    # another device or in another precision; it has no public way to begin anew.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=accumulate,
        cpu=device.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise UsageError(
            f"{started} processes were started, and accelerate sees {accelerator.num_processes}: "
            "start them with torchrun"
        )
    return accelerator


def spread(losses: Losses, device: torch.device, parallel: Parallel) -> nn.Module:
    """`losses` on `device`, with gradients averaged over the processes where there are several.

    By FSDP the parameters of `losses` are then others, each a process' part of those before.
    """
    if losses.share.processes > 1 and parallel == "fsdp":
        _shard(losses, device)
        return losses
    losses.to(device)
    if losses.share.processes == 1:
        return losses
    return DistributedDataParallel(
        losses,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,  # stages differ in what learns
    )


def _shard(losses: Losses, device: torch.device) -> None:
    """Split the parameters of `losses` in place, moving a block at a time to `device`.

    What is in no decoder block (embeddings, final norm, front, heads) is whole while the losses or
    the measures are computed, since some of these read it outside of any module's `forward`. A pass
    that ends early leaves the block where it ended whole; the backward pass sets that right.
    Autocast chooses the precision, so FSDP gets no policy for it; and gradients are shared out
    after each pass even when they are accumulated, since whole ones would need the memory that is
    being saved.
    """
    mesh = init_device_mesh(device.type, (losses.share.processes,))
    for block in decoder_blocks(losses.model):
        fully_shard(block, mesh=mesh)
    fully_shard(losses, mesh=mesh)
    register_fsdp_forward_method(losses, "evaluate")


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, in the same memory: some of its rows, or all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], share: Share) -> dict[str, Tensor]:
    """`tensors` put together from the processes' parts, on the CPU, for the first process alone.

    All must ask. The others get nothing: several on one machine would fill its memory.
    """
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if share.rank == 0:
            found[name] = full.detach().cpu()
    return found


def as_first(value: float, share: Share, device: torch.device) -> float:
    """The first process' `value` in all of them: clocks and roundings are each one's own."""
    if share.processes == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.broadcast(told, 0)
    return told.item()


def over_processes(losses: Mapping[str, Tensor], share: Share) -> dict[str, float]:
    """Losses of the whole batch, the same in every process."""
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    if share.processes > 1:
        distributed.all_reduce(values)
        values /= share.processes
    return dict(zip(losses, values.tolist(), strict=True))
