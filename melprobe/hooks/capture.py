"""Catching residuals at chosen positions while a model runs.

The residuals of L blocks are h_0 to h_L: h_l enters block l, and h_L leaves the last one, before
the final norm. A residual's number is its l, so `{3}` is what block 3 reads, not what it writes
(that is 4), and there are L + 1 of them.

The hooks stand behind those of all interventions, whichever began first, so what is caught is what
they left: under a skip of block l, h_{l+1} is h_l at the skipped positions.

Shapes: B batch, S sequence positions that a pass computes, N of them that are caught, R residuals,
D width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from melprobe.hooks.cuts import residuals
from melprobe.hooks.layers import block_input, check_residuals, decoder_blocks
from melprobe.hooks.positions import Kind, PositionTracker
from melprobe.model.exit import check_residuals_reached
from melprobe.shards import Caught


@contextmanager
def capture(
    model: PreTrainedModel,
    numbers: Iterable[int],
    positions: str = "speech",
    dtype: torch.dtype | None = None,
    *,
    take: Callable[[Caught], object],
) -> Iterator[None]:
    """Hand the residuals of these numbers to `take` after every forward pass inside the `with`.

    dtype: what they are rounded to; as the model has them when not given. They stay on the model's
    device. A pass that fails hands out nothing. Restored on any exit. Raises UsageError for a
    number or a position kind that the model doesn't have.
    """
    blocks = decoder_blocks(model)
    chosen = check_residuals(numbers, len(blocks))
    check_residuals_reached(model.config, chosen)

    def hand_out(*_: Any) -> None:
        take(running.end())

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        running = _Running(tracker, chosen, positions, dtype)
        for number in chosen:
            stack.callback(_listen(blocks, number, partial(running.catch, number)).remove)
        stack.callback(model.register_forward_pre_hook(running.begin).remove)
        stack.callback(model.register_forward_hook(hand_out).remove)
        yield


class _Running:
    """The forward pass that is under way: where its rows stand, and what came by of them."""

    def __init__(
        self,
        tracker: PositionTracker,
        numbers: list[int],
        positions: str,
        dtype: torch.dtype | None,
    ):
        self.tracker = tracker
        self.numbers = numbers
        self.positions = positions
        self.dtype = dtype
        self.where: Tensor | None = None  # (B, S) bool
        self.places: Tensor  # (N,) of the flattened batch
        self.caught: Tensor | None = None  # (R, N, D)

    def begin(self, *_: Any) -> None:
        """The tracker has seen the inputs: its hook stands in front."""
        self.where = self.tracker.selected(self.positions)
        self.places = self.where.flatten().nonzero()[:, 0]
        self.caught = None

    def catch(self, number: int, residual: Tensor) -> None:
        """Copy rows out of h_number (B, S, D).

        All into one large tensor: many small ones among a pass's own would leave gaps in memory
        when they are freed, and those add up from batch to batch.
        """
        if self.where is None:
            raise RuntimeError("the decoder ran without the model around it: kinds are unknown")
        places = self.places.to(residual.device)  # blocks may be spread over several
        rows = residual.detach().flatten(0, 1).index_select(0, places)
        if self.caught is None:
            dtype = self.dtype or rows.dtype
            self.caught = rows.new_empty(len(self.numbers), *rows.shape, dtype=dtype)
        self.caught[self.numbers.index(number)] = rows

    def end(self) -> Caught:
        where, caught = self.where, self.caught
        self.where = self.caught = None
        assert where is not None and caught is not None
        kinds, width = self.tracker.kinds_so_far, where.shape[1]
        position = (kinds != Kind.PADDING).cumsum(1) - 1
        kind = kinds[:, -width:][where]
        middles = self.tracker.middles_so_far()[:, -width:][where]
        return Caught(
            numbers=self.numbers,
            residuals=caught,
            clip=where.nonzero()[:, 0],
            position=position[:, -width:][where],
            kind=kind,
            seconds=middles.masked_fill(kind != Kind.SPEECH, torch.nan),
        )


def _listen(blocks: nn.ModuleList, number: int, catch: Callable[[Tensor], None]) -> Any:
    """Have `catch` called with h_number (B, S, D) from now on; returns the hook's handle."""

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        catch(block_input(args, kwargs))

    def leaves(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        catch(residuals(args, kwargs, output)[1])

    if number < len(blocks):
        return blocks[number].register_forward_pre_hook(enters, with_kwargs=True)
    return blocks[-1].register_forward_hook(leaves, with_kwargs=True)
