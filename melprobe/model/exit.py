"""Speech positions that leave the decoder after a middle block, and the work that saves.

With `speech_exit` K in a model's config, blocks K+1 and up work on the other positions alone (BOS,
prompt, answer). These still read what was heard: in every upper block the keys and values of the
speech positions are those of h_{K+1}, the residual that block K hands on. That is what skipping
the upper blocks at speech positions computes (`melprobe.hooks.cuts.skip`), without its queries,
attention rows, output projections and MLPs at speech positions. The cache holds all positions in
their places, so decoding goes on as in any model.

The decoder's own forward pass runs, with hooks on its upper blocks while it lasts. A block finds
its keys and values by itself: it is run on the speech positions as far as the cache it hands them
to, which is its own code for norms and rotations, whatever they are. Then it is run on the text
alone, before a cache that adds those of the speech.

Shapes: B batch, S positions of the pass, N of them text or speech in the longest row, K keys that
can be attended to, D width.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from melprobe.errors import UsageError
from melprobe.hooks.layers import block_input, decoder_blocks, format_layers

MASKED_ATTENTION = {"sdpa", "eager"}
"""Attention that takes a mask with a row for each query; flash attention does not."""
_KNOWN = {"hidden_states", "attention_mask", "position_ids", "cache_position"}
"""Tensors that a block is given. `cache_position` is for the cache, which gets all positions."""


def check_exit(model: Any, after: int) -> None:
    """UsageError unless speech can leave this Mel-LLM after block `after`."""
    blocks, config = decoder_blocks(model), model.get_decoder().config
    if not 0 <= after < len(blocks) - 1:
        raise UsageError(
            f"speech exit {after}: take a block from 0 to {len(blocks) - 2}; block "
            f"{len(blocks) - 1} is the last, so leaving after it saves nothing"
        )
    windows = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [windows] * len(blocks)
    for layer in range(after + 1, len(blocks)):
        kind = type(blocks[layer]).__name__
        if kinds[layer] != "full_attention":
            raise UsageError(
                f"speech exit {after}: block {layer} ({kind}) has {kinds[layer]}; speech can leave "
                "only below blocks that attend to everything"
            )
        attention = getattr(blocks[layer], "self_attn", None)
        for name in ("q_proj", "k_proj", "v_proj"):
            if not isinstance(getattr(attention, name, None), nn.Module):
                raise UsageError(
                    f"speech exit {after}: {kind} has no `self_attn.{name}`; take a base that has, "
                    "such as Llama, Qwen or Mistral"
                )


def check_reached(config: Any, layers: Iterable[int]) -> None:
    """UsageError where speech has left the model (of this config) before one of these blocks."""
    last = getattr(config, "speech_exit", None)  # others' models have none
    if last is None:
        return
    if above := [layer for layer in layers if layer > last]:
        raise UsageError(
            f"speech leaves this model after block {last}, so blocks {format_layers(above)} can't "
            "be cut or watched: take the model that it was made from"
        )


def check_residuals_reached(config: Any, numbers: Iterable[int]) -> None:
    """The same of residuals: h_l is with block l, and what leaves the last block is with it."""
    last = config.get_text_config().num_hidden_layers - 1
    check_reached(config, {min(number, last) for number in numbers})


@contextmanager
def speech_leaves(model: Any, speech: Tensor, text: Tensor, past: int) -> Iterator[None]:
    """Let speech leave after block `model.config.speech_exit` in the decoder's pass inside.

    speech, text: (B, S) bool; what is neither is padding, and comes out as anything. past: how
    many positions the cache holds already. Raises UsageError for attention that takes no mask.
    """
    attention = model.get_decoder().config._attn_implementation
    if attention not in MASKED_ATTENTION:
        raise UsageError(
            f"attention {attention!r} can't leave speech out: load the model with "
            "attn_implementation='sdpa'"
        )
    upper = decoder_blocks(model)[model.config.speech_exit + 1 :]
    leaving = _Leaving(speech, text, past)
    with ExitStack() as stack:
        first = upper[0].register_forward_pre_hook(leaving.part, with_kwargs=True)
        stack.callback(first.remove)
        for block in upper:
            handle = block.register_forward_pre_hook(leaving.narrow, with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(upper[-1].register_forward_hook(leaving.join).remove)
        yield


class _Leaving:
    """One pass: where speech and text stand, and the speech's last residual."""

    def __init__(self, speech: Tensor, text: Tensor, past: int):
        self.speech, self.text = _places(speech), _places(text)
        rank = text.cumsum(1) - 1 + self.speech.shape[1]
        self.back = torch.where(text, rank, speech.cumsum(1) - 1).clamp(min=0)
        """(B, S) where each position is, when text stands behind speech."""
        self.past = past
        self.residual: Tensor

    def part(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first upper block: keep h_{K+1} of the speech, go on with the text's."""
        strange = [n for n, x in kwargs.items() if isinstance(x, Tensor) and n not in _KNOWN]
        if strange or len(args) > 1:
            raise UsageError(
                f"{type(block).__name__} is given {', '.join(strange) or 'more than the residual'} "
                "for its positions, and speech can't leave before it: take another base"
            )
        hidden = block_input(args, kwargs)
        self.residual = _pick(hidden, self.speech)
        return (_pick(hidden, self.text),), _without_hidden(kwargs)

    def narrow(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before an upper block: its keys and values for speech; all else for the text alone."""
        there = _at(self.speech, kwargs)
        keys, values = _keys_values(block, self.residual, there)
        mask = self._rows(kwargs.get("attention_mask"))
        cache = _Joining(self, keys, values, mask.shape[-1], kwargs.get("past_key_values"))
        here = _at(self.text, kwargs) | {"attention_mask": mask, "past_key_values": cache}
        return (block_input(args, kwargs),), _without_hidden(here)

    def join(self, block: Any, args: Any, output: Any) -> Any:
        """After the last block: all positions (B, S, D), in their order."""
        if isinstance(output, tuple):
            return (self.whole(self.residual, output[0], 1), *output[1:])
        return self.whole(self.residual, output, 1)

    def whole(self, speech: Tensor, text: Tensor, dim: int) -> Tensor:
        """Both in the order of the pass; positions stand along `dim`."""
        return _pick(torch.cat([speech, text], dim), self.back, dim)

    def _rows(self, mask: Tensor | None) -> Tensor:
        """The mask (B, 1, N, K) of the text's queries; the block's own may be None: causal."""
        if mask is not None:
            return _pick(mask, self.text, 2)
        keys = torch.arange(self.past + self.back.shape[1], device=self.text.device)
        return (keys <= self.text[..., None] + self.past)[:, None]


class _Joining:
    """Stands before the block's cache, if it has one, and adds the speech to what comes in."""

    def __init__(self, leaving: _Leaving, keys: Tensor, values: Tensor, width: int, cache: Any):
        self.leaving, self.keys, self.values = leaving, keys, values
        self.width, self.cache = width, cache

    def update(
        self, keys: Tensor, values: Tensor, *others: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, K, width of a head) for the text's queries."""
        keys = self.leaving.whole(self.keys, keys, 2)
        values = self.leaving.whole(self.values, values, 2)
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *others, **more)
        # A static cache has room for positions that don't exist yet.
        return keys[:, :, : self.width], values[:, :, : self.width]


class _Handed(Exception):
    """A block has handed its keys and values to its cache, and is not to go on."""


class _Stop:
    """In the place of a block's cache."""

    def update(self, keys: Tensor, values: Tensor, *others: Any, **more: Any) -> None:
        raise _Handed(keys, values)


class _NoQueries(nn.Module):
    """In the place of a block's query projection: zeros, without the work."""

    def __init__(self, projection: Any):
        super().__init__()
        self.width = projection.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], self.width)


def _keys_values(block: Any, residual: Tensor, there: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, heads, N, width of a head) that others read where `residual` (B, N, D) stands."""
    attention = block.self_attn
    queries = attention.q_proj
    attention.q_proj = _NoQueries(queries)
    try:
        # Not `block(…)`, on which there are hooks.
        block.forward(residual, **(dict(there) | {"past_key_values": _Stop()}))
    except _Handed as handed:
        keys, values = handed.args
        return keys, values
    finally:
        attention.q_proj = queries
    raise UsageError(f"{type(block).__name__} gives its keys and values to no cache")


def _at(places: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments for these positions (B, N) alone; the mask is not among them."""
    found = {**kwargs, "attention_mask": None}
    if (turns := kwargs.get("position_embeddings")) is not None:
        found["position_embeddings"] = tuple(_pick(turn, places) for turn in turns)
    if (numbers := kwargs.get("position_ids")) is not None:
        found["position_ids"] = _pick(numbers, places)
    return found


def _without_hidden(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _places(where: Tensor) -> Tensor:
    """(B, N) the positions where (B, S) is True, in order; shorter rows repeat their first."""
    counts = where.sum(1, keepdim=True)
    found = where.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    numbers = torch.arange(found.shape[1], device=where.device)
    return torch.where(numbers < counts, found, found[:, :1])


def _pick(x: Tensor, places: Tensor, dim: int = 1) -> Tensor:
    """Of x (B or 1, …, S, …) with S along `dim`, what stands at these places (B, N)."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    x = x.movedim(dim, 1)
    return x.expand(len(places), *x.shape[1:])[rows, places].movedim(1, dim)
