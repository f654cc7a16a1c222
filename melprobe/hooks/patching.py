"""Activation patching: the residual of one run put into another, and its first-order estimate.

A *clean* run hears a clip, a *corrupted* one something else that is as long: another clip, or the
same one in noise. At chosen positions, what enters block l of the corrupted run is replaced by what
enters it in the clean one. How much of the likelihood comes back says what those positions hold
there that the blocks from l on still read (Meng et al. 2022, 2202.05262; how to read it:
Heimersheim and Nanda 2024, 2404.15255).

Attribution patching estimates all blocks from one backward pass of the corrupted run: the gradient
times the difference (Nanda 2023; where it fails: Kramár et al. 2024, 2403.00745).

Shapes: B clips, S positions of a prompt, N of them chosen, D width, L blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.capture import capture
from melprobe.hooks.layers import (
    block_input,
    check_layers,
    decoder_blocks,
    with_block_input,
)
from melprobe.hooks.parts import in_place
from melprobe.hooks.positions import Kind, PositionTracker, parse_positions
from melprobe.model.exit import check_reached
from melprobe.model.inference import answer_nll
from melprobe.shards import Caught

Entering = dict[int, list[Tensor]]
"""Of each block, what enters it at the chosen positions: (N, D) of each clip."""


@torch.no_grad()
def entering(model: PreTrainedModel, inputs: BatchFeature, positions: str = "speech") -> Entering:
    """What enters each block at these positions when the model runs on a batch of prompts."""
    passes: list[Caught] = []
    with capture(model, range(len(decoder_blocks(model))), positions, take=passes.append):
        model(**inputs, logits_to_keep=1)
    (caught,) = passes
    rows = torch.bincount(caught.clip, minlength=len(inputs["input_ids"])).tolist()
    return {layer: list(caught.h(layer).split(rows)) for layer in caught.numbers}


@contextmanager
def patch(
    model: PreTrainedModel, values: Mapping[int, Sequence[Tensor]], positions: str = "speech"
) -> Iterator[None]:
    """Put what entered these blocks in another run into a run of the same clips.

    values: of each block that is patched, (N, D) of each clip, as `entering` gives it; a
    row with no such position, or a pass with none (a decoding step), stays as it is. The answer of
    another run is made of other words, so `positions` may not hold it. Raises UsageError for that,
    for blocks that aren't there, and for a clip with another number of positions.
    """
    check_patched_positions(positions)
    blocks = decoder_blocks(model)
    layers = check_layers(values, len(blocks))
    check_reached(model.config, layers)

    def put(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, where = block_input(args, kwargs), tracker.selected(positions)
            if not where.any():
                return None
            _check_same_counts(values[layer], where)
            put_in = in_place(values[layer], where).to(hidden)
            changed = torch.where(where[..., None], put_in, hidden)
            return with_block_input(args, kwargs, changed)

        return hook

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for layer in layers:
            handle = blocks[layer].register_forward_pre_hook(
                put(layer), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        yield


def attribution(
    model: PreTrainedModel, inputs: BatchFeature, clean: Entering, positions: str = "speech"
) -> Tensor:
    """(L, B) by how many nat patching each block would change the NLL of each clip's answer,

    to first order. inputs: of the corrupted run, with `labels` (B, S). clean: what entered all
    blocks of the clean one at `positions`. Raises UsageError as `patch` does.
    """
    check_patched_positions(positions)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = block_input(args, kwargs)
        if not seen:  # nothing below has to be learnt, so the graph begins here
            hidden = hidden.detach().requires_grad_()
        seen.append(hidden)
        return with_block_input(args, kwargs, hidden)

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for block in decoder_blocks(model):
            handle = block.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        with torch.enable_grad():
            nll = answer_nll(model, inputs)
        where = tracker.selected(positions)
        gradients = torch.autograd.grad(nll, seen)
    _check_same_counts(clean[0], where)
    changes = [
        (in_place(clean[layer], where) - hidden).where(where[..., None], 0) * gradient
        for layer, (hidden, gradient) in enumerate(zip(seen, gradients, strict=True))
    ]
    return torch.stack([change.float().sum((1, 2)) for change in changes]).detach()


def check_patched_positions(positions: str) -> None:
    """UsageError for positions whose content is the model's own answer."""
    if Kind.ANSWER in parse_positions(positions).kinds:
        raise UsageError(
            f"positions {positions!r}: two runs answer with other words; take speech, prompt or bos"
        )


def _check_same_counts(values: Sequence[Tensor], where: Tensor) -> None:
    """UsageError where a clip's values don't fill its positions (B, S) one by one."""
    wanted = where.sum(1).tolist()
    given = [len(value) for value in values]
    if given != wanted:
        raise UsageError(
            f"the two runs have {given} and {wanted} positions there: give clips as long as each "
            "other"
        )
