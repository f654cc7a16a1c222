"""Skipping decoder blocks at chosen positions, and watching what blocks do to the residual.

Block l maps h_l to h_{l+1}. A *skipped* block leaves the chosen positions as they were,
h_{l+1}[P] = h_l[P], and goes on being read there: its keys and values are those of the unchanged
h_l[P], for the other positions in this block and for every later decoding step from the cache.

Hooks are put in front of all others, so whoever else listens hears the changed residual.
Shapes: B batch, S sequence positions, D width.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melprobe.hooks.layers import check_layers, decoder_blocks
from melprobe.hooks.positions import PositionTracker, check_positions
from melprobe.model.modelling import MelLLMForConditionalGeneration


@contextmanager
def skip(
    model: MelLLMForConditionalGeneration, layers: Iterable[int], positions: str = "speech"
) -> Iterator[None]:
    """Skip these blocks at these positions while the block lasts; restored on any exit.

    Holds in prefill, in every decoding step and in teacher forcing. Contexts nest: each adds its
    own. Raises UsageError for a layer or a position kind that the model doesn't have.
    """
    blocks = decoder_blocks(model)
    chosen = check_layers(layers, len(blocks))
    check_positions(positions)

    def keep_input(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = _residuals(args, kwargs, output)
        where = tracker.selected(positions)[..., None]
        return _with_residual(output, torch.where(where, before, after))

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker(model.config.audio_token_id).watching(model))
        for layer in chosen:
            handle = blocks[layer].register_forward_hook(keep_input, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
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
def watch_blocks(
    model: MelLLMForConditionalGeneration, positions: str = "speech"
) -> Iterator[BlockChange]:
    """Measure block influence 1 − cos (ShortGPT, 2403.03853) and angular distance (2403.17887).

    Clips with no such position give NaN.
    """
    blocks = decoder_blocks(model)
    check_positions(positions)
    change = BlockChange(len(blocks))

    def measure(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _residuals(args, kwargs, output)
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)
            where = tracker.selected(positions)
            n = where.sum(1)
            change.cosine[layer].append((cosine * where).sum(1) / n)
            change.angle[layer].append((cosine.arccos() / torch.pi * where).sum(1) / n)

        return hook

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker(model.config.audio_token_id).watching(model))
        for layer, block in enumerate(blocks):
            handle = block.register_forward_hook(measure(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield change


def _residuals(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """h_l and h_{l+1}; blocks return a tensor or a tuple that begins with one."""
    before = args[0] if args else kwargs["hidden_states"]
    return before, output[0] if isinstance(output, tuple) else output


def _with_residual(output: Any, residual: Tensor) -> Any:
    return (residual, *output[1:]) if isinstance(output, tuple) else residual
