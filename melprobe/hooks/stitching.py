"""Two models made into one: the lower blocks of one under the upper ones of the other, or one

block in the other's place. If the arms of a pair do the same thing up to a block, the
blocks above it shouldn't mind whose work they go on with (Lenc and Vedaldi 2015, 1411.5908;
Bansal et al. 2021, 2106.07682).

Shapes: B clips, S positions, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.cuts import residuals, with_residual
from melprobe.hooks.layers import block_input, check_layers, decoder_blocks, with_block_input

Rows = Callable[[Tensor], Tensor]
"""What is done to residuals (N, D)"""


@contextmanager
def stitch(model: PreTrainedModel, layer: int, residual: Tensor, where: Tensor) -> Iterator[None]:
    """Have the blocks from `layer` on work with what another model made, inside a `with`.

    residual: (B, S, D) that enters block `layer` there. where: (B, S) bool, the positions at which
    it is taken; the others keep this model's own. What passes has to be one whole sequence: in a
    decoding step there would be nothing of the other model. Raises UsageError for a layer that
    isn't there, and for a pass of another shape.
    """
    blocks = decoder_blocks(model)
    (layer,) = check_layers([layer], len(blocks))

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        own = block_input(args, kwargs)
        if own.shape != residual.shape:
            raise UsageError(
                f"stitching at block {layer}: a pass of {tuple(own.shape)} was given what another "
                f"model made of one of {tuple(residual.shape)}; both have to be the same batch"
            )
        return with_block_input(args, kwargs, residual.to(own).where(where[..., None], own))

    handle = blocks[layer].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def exchange_block(a: PreTrainedModel, b: PreTrainedModel, layer: int) -> Iterator[None]:
    """Give each of two models the other's block `layer` inside a `with`.

    Of models over one base with folded adapters, that exchanges what the adapters changed in the
    block. Restored bit for bit on any exit. Raises UsageError for a block that isn't in both, or is
    of another shape in one of them.
    """
    both = [decoder_blocks(model) for model in (a, b)]
    (layer,) = check_layers([layer], min(map(len, both)))
    ours, its = (dict(blocks[layer].named_parameters()) for blocks in both)
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in its.items()}:
        raise UsageError(f"block {layer} is of other shapes in the two models: it has no exchange")
    pairs = [(ours[name], its[name]) for name in ours]

    def swap() -> None:
        for one, other in pairs:
            one.data, other.data = other.data, one.data

    swap()
    try:
        yield
    finally:
        swap()


@contextmanager
def borrow_block(
    model: PreTrainedModel,
    donor: PreTrainedModel,
    layer: int,
    donated: Tensor,
    where: Tensor,
    there: Rows,
    back: Rows,
) -> Iterator[None]:
    """Have the donor's block `layer` do the work of this model's inside a `with`, through maps.

    What enters the block here is mapped `there`, the donor's block works on it, and what that adds
    is brought `back` and added here. donated: (B, S, D) that enters the block in the donor; it is
    what the block sees outside `where` (B, S), where nothing changes here: the first position, an
    attention sink, is each model's own. Takes one whole sequence, as `stitch` does.
    """
    (layer,) = check_layers([layer], len(decoder_blocks(model)))
    borrowed = decoder_blocks(donor)[layer]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        own, after = residuals(args, kwargs, output)
        entering = donated.to(own, copy=True)
        entering[where] = there(own[where]).to(own)
        args, kwargs = with_block_input(args, kwargs | {"past_key_values": None}, entering)
        _, left = residuals(args, kwargs, borrowed(*args, **kwargs))
        changed = after.clone()
        changed[where] = own[where] + back((left - entering)[where]).to(own)
        return with_residual(output, changed)

    handle = decoder_blocks(model)[layer].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
