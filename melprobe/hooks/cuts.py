"""Cutting decoder blocks at chosen positions, and watching what blocks do to the residual.

Block l maps h_l to h_{l+1}. It does two things for the positions P, which are cut apart or
together: it *processes* them (h_{l+1}[P] is not h_l[P]), and lets others *read* them (positions
outside P attend to P in this block).

                processed       not processed
    read        intact          skip
    not read    knock-out       bypass

Positions keep their place in all of them. A cut holds in prefill, in every decoding step and in
teacher forcing; a skipped position's keys and values are those of the unchanged h_l[P], and stand
in the cache for later steps.

Hooks are put in front of all others, so whoever else listens hears the changed residual.
Shapes: B batch, S sequence positions that a pass computes, K those it can attend to, D width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.layers import block_input, check_layers, decoder_blocks
from melprobe.hooks.positions import Kind, PositionTracker, parse_positions
from melprobe.model.exit import MASKED_ATTENTION, check_reached


def skip(
    model: PreTrainedModel, layers: Iterable[int], positions: str = "speech"
) -> AbstractContextManager[None]:
    """Skip these blocks at these positions: not processed, still read. See `cut`."""
    return cut(model, layers, positions, process=False, read=True)


@contextmanager
def knock_out(
    model: PreTrainedModel,
    layers: Iterable[int],
    positions: str = "speech",
    readers: str | None = None,
    beyond: float = 0.0,
) -> Iterator[None]:
    """Hide these positions in these blocks: processed, not read. See `cut`.

    readers: the positions that they are hidden from, each still sees itself (attention knock-out,
    Geva et al. 2304.14767); all others than `positions` when not given. beyond: of speech from
    speech, hide only what sounds more than so many seconds earlier.
    """
    if readers is None:
        with cut(model, layers, positions, process=True, read=False):
            yield
        return
    blocks = decoder_blocks(model)
    chosen = check_layers(layers, len(blocks))
    check_reached(model.config, chosen)
    kinds = [parse_positions(where).kinds for where in (positions, readers)]
    if beyond and kinds != [(Kind.SPEECH,)] * 2:
        raise UsageError(f"beyond {beyond:g} s: only speech is far from speech in seconds")
    _check_attention(model)

    def unread() -> Tensor:
        there, asking = tracker.selected_so_far(positions), tracker.selected(readers)
        hidden = there[:, None, None, :] & asking[:, None, :, None]  # (B, 1, S, K)
        keys = torch.arange(there.shape[1], device=there.device)
        queries = keys[-asking.shape[1] :, None]
        if beyond:
            when = tracker.middles_so_far()
            apart = when[:, queries] - when[:, None, :]  # multiples of a patch, but for rounding
            hidden &= (apart > beyond + 1e-4)[:, None]
        return hidden & (queries != keys)

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions, readers))
        for layer in chosen:
            stack.callback(_hide(blocks[layer], unread).remove)
        yield


def bypass(
    model: PreTrainedModel, layers: Iterable[int], positions: str = "speech"
) -> AbstractContextManager[None]:
    """Lead these positions around these blocks: neither processed nor read. See `cut`."""
    return cut(model, layers, positions, process=False, read=False)


@contextmanager
def cut(
    model: PreTrainedModel,
    layers: Iterable[int],
    positions: str = "speech",
    *,
    process: bool,
    read: bool,
) -> Iterator[None]:
    """Change what these blocks do for these positions inside a `with`; restored on any exit.

    Contexts nest: each adds its own. Raises UsageError for a layer or a position kind that the
    model doesn't have, and for attention that takes no mask (`read=False` only).
    """
    blocks = decoder_blocks(model)
    chosen = check_layers(layers, len(blocks))
    check_reached(model.config, chosen)
    if not read:
        _check_attention(model)

    def keep_input(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = residuals(args, kwargs, output)
        where = _last(tracker.selected(positions), before)[..., None]
        return with_residual(output, torch.where(where, before, after))

    def unread() -> Tensor:
        there, asking = tracker.selected_so_far(positions), tracker.selected(positions)
        return there[:, None, None, :] & ~asking[:, None, :, None]  # (B, 1, S, K)

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for layer in chosen:
            if not process:
                handle = blocks[layer].register_forward_hook(
                    keep_input, with_kwargs=True, prepend=True
                )
                stack.callback(handle.remove)
            if not read:
                stack.callback(_hide(blocks[layer], unread).remove)
        yield


class BlockChange:
    """How far each block turns the residual, per clip: similarity, which is not damage.

    cosine[l]: one (B,) tensor per forward pass, the mean over positions of cos(h_l, h_{l+1});
    angle[l]: likewise of arccos cos(h_l, h_{l+1}) / π.

    2403.17887 takes the angular distance at each sample's last token only; this one is the mean
    over all chosen positions of a clip, and whoever reports it means over clips.
    """

    def __init__(self, n_layers: int):
        self.cosine: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self.angle: list[list[Tensor]] = [[] for _ in range(n_layers)]


@contextmanager
def watch_blocks(model: PreTrainedModel, positions: str = "speech") -> Iterator[BlockChange]:
    """Measure block influence 1 − cos (ShortGPT, 2403.03853) and angular distance (2403.17887).

    Clips with no such position give NaN.
    """
    blocks = decoder_blocks(model)
    check_reached(model.config, range(len(blocks)))
    change = BlockChange(len(blocks))

    def measure(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = residuals(args, kwargs, output)
            cosine, angle = turn(before, after, _last(tracker.selected(positions), before))
            change.cosine[layer].append(cosine)
            change.angle[layer].append(angle)

        return hook

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for layer, block in enumerate(blocks):
            handle = block.register_forward_hook(measure(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield change


def turn(before: Tensor, after: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean cosine and angle / π between residuals (B, S, D), over the positions `where`."""
    cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)
    n = where.sum(1)
    return (cosine * where).sum(1) / n, (cosine.arccos() / torch.pi * where).sum(1) / n


@contextmanager
def hide_keys(model: PreTrainedModel, unread: Tensor) -> Iterator[None]:
    """Hide from attention in every block; `unread` (B or 1, 1, S, K) is True where hidden."""
    _check_attention(model)
    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.callback(_hide(block, lambda: unread).remove)
        yield


def _hide(block: nn.Module, unread: Callable[[], Tensor]) -> RemovableHandle:
    """From now on hide from the block's attention what is `unread()` (B or 1, 1, S, K)."""

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        queries = block_input(args, kwargs).shape[1]
        hidden = _hidden(kwargs.get("attention_mask"), unread()[..., -queries:, :])
        return args, kwargs | {"attention_mask": hidden}

    return block.register_forward_pre_hook(hide, with_kwargs=True, prepend=True)


def _check_attention(model: PreTrainedModel) -> None:
    decoder: Any = model.get_decoder()
    if (attention := decoder.config._attn_implementation) not in MASKED_ATTENTION:
        raise UsageError(
            f"attention {attention!r} can't hide positions: load the model with "
            "attn_implementation='sdpa'"
        )


def residuals(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """h_l and h_{l+1}; blocks return a tensor or a tuple that begins with one."""
    return block_input(args, kwargs), output[0] if isinstance(output, tuple) else output


def _last(where: Tensor, residual: Tensor) -> Tensor:
    """Of (B, S) the columns that a block computes: Gemma's upper blocks may do only the last."""
    return where[:, -residual.shape[1] :]


def with_residual(output: Any, residual: Tensor) -> Any:
    """What a block returned, with another residual."""
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def _hidden(mask: Tensor | None, unread: Tensor) -> Tensor:
    """An attention mask that also hides what is `unread` (B or 1, 1, S, K).

    mask: True where attention is allowed, or numbers added to its scores; None is causal. It may
    be wider than K, since a static cache has room for positions that don't exist yet, or narrower,
    where a sliding window has left the oldest behind.
    """
    queries, keys = unread.shape[-2:]
    if mask is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=unread.device)
        mask = allowed.tril(keys - queries)
    unread = unread[..., -mask.shape[-1] :]
    unread = F.pad(unread, (0, mask.shape[-1] - unread.shape[-1]))
    if mask.dtype == torch.bool:
        return mask & ~unread
    return mask.masked_fill(unread, torch.finfo(mask.dtype).min)
