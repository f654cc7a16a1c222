"""Ablating parts of decoder blocks: attention, the MLP, or single heads.

A part adds its contribution to the residual. At the chosen positions that contribution is replaced:
by zero; by the part's mean (`watch_means`), which keeps what it adds to every clip alike and takes
away what it says about this one; or by what it adds to another clip (`watch_parts`, `in_place`),
which takes that away and stays as varied as ever.

A head's contribution is taken before the output projection, so it is of the head's own width.
That a part's output is what the residual gets holds for Llama and its kin, not for blocks that
normalise it once more (Gemma 2 and 3).
Shapes: B batch, S sequence positions, D the width of a part's contribution.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from melprobe.errors import UsageError
from melprobe.hooks.layers import check_layers, decoder_blocks, format_layers
from melprobe.hooks.positions import PositionTracker
from melprobe.model.exit import check_reached

PartName = Literal["attention", "mlp", "head"]


class Target(NamedTuple):
    """What is cut at once: blocks, or one head of a block."""

    layers: tuple[int, ...]
    head: int | None = None

    @property
    def label(self) -> str:
        """As rows and results have it: "14", "3,5-8", or "14.2" for head 2 of block 14."""
        blocks = format_layers(self.layers)
        return blocks if self.head is None else f"{blocks}.{self.head}"


class Part(NamedTuple):
    """`attention` or `mlp` of a block, or one `head` of its attention; counted from 0."""

    layer: int
    name: PartName
    head: int | None = None


def parts_of(
    model: PreTrainedModel, name: PartName, layers: Iterable[int] | None = None
) -> list[Part]:
    """All parts of that name in these blocks (in all of them when not given)."""
    blocks = decoder_blocks(model)
    chosen = check_layers(range(len(blocks)) if layers is None else layers, len(blocks))
    if name == "head":
        return [Part(layer, name, head) for layer in chosen for head in range(_n_heads(model))]
    return [Part(layer, name) for layer in chosen]


@contextmanager
def ablate(
    model: PreTrainedModel,
    parts: Iterable[Part],
    positions: str = "speech",
    values: Mapping[Part, Tensor] | None = None,
) -> Iterator[None]:
    """Replace what these parts contribute at these positions inside a `with`; restored on exit.

    values: (D,) for each part, or (B, S, D) for a pass over a batch whose positions stand so, and
    for none of the later steps; zero for parts that aren't there. Contexts nest. Raises UsageError
    for a part or positions that the model doesn't have.
    """

    def replace(part: Part, contribution: Tensor, where: Tensor) -> Tensor:
        value = contribution.new_zeros(()) if values is None else values.get(part, torch.zeros(()))
        if value.dim() == 3 and not where.any():
            return contribution  # a decoding step, which has no such positions
        return torch.where(where[..., None], value.to(contribution), contribution)

    with _changing_all(model, parts, positions, replace):
        yield


class Means:
    """Mean contributions (D,) over all chosen positions of all passes that were watched."""

    def __init__(self) -> None:
        self._sums: dict[Part, Tensor] = {}
        self._counts: dict[Part, int] = {}

    def add(self, part: Part, contribution: Tensor) -> None:
        """Contributions (N, D) of one pass."""
        total = contribution.double().sum(0)
        self._sums[part] = self._sums.get(part, torch.zeros_like(total)) + total
        self._counts[part] = self._counts.get(part, 0) + len(contribution)

    def values(self) -> dict[Part, Tensor]:
        """UsageError when no such position came by."""
        if not self._counts or not min(self._counts.values()):
            raise UsageError("means: no such position in what the model ran on")
        return {part: (total / self._counts[part]).float() for part, total in self._sums.items()}


@contextmanager
def watch_means(
    model: PreTrainedModel, parts: Iterable[Part], positions: str = "speech"
) -> Iterator[Means]:
    """Average what these parts contribute at these positions, over whatever runs inside."""
    means = Means()

    def note(part: Part, contribution: Tensor, where: Tensor) -> Tensor:
        means.add(part, contribution[where])
        return contribution

    with _changing_all(model, parts, positions, note):
        yield means


@contextmanager
def watch_parts(
    model: PreTrainedModel, parts: Iterable[Part], positions: str = "speech"
) -> Iterator[dict[Part, list[Tensor]]]:
    """What these parts contribute there in the last pass inside: (N, D) of each clip."""
    seen: dict[Part, list[Tensor]] = {}

    def note(part: Part, contribution: Tensor, where: Tensor) -> Tensor:
        seen[part] = [row[there] for row, there in zip(contribution, where, strict=True)]
        return contribution

    with _changing_all(model, parts, positions, note):
        yield seen


def in_place(contributions: Sequence[Tensor], where: Tensor) -> Tensor:
    """Contributions (N, D) of each clip, put where (B, S) is True, as `ablate` takes them.

    The clip's k-th place gets the k-th of them, from the beginning again where they are too few.
    Raises ValueError where a clip has places and nothing to put there.
    """
    values = []
    for row, there in zip(contributions, where, strict=True):
        if there.any() and not len(row):
            raise ValueError("nothing to put in the place of a clip's contributions")
        places = (there.cumsum(0) - 1).clamp(min=0) % max(1, len(row))
        given = row[places] if len(row) else row.new_zeros(len(there), row.shape[1])
        values.append(given * there[:, None])
    return torch.stack(values)


@contextmanager
def _changing_all(
    model: PreTrainedModel,
    parts: Iterable[Part],
    positions: str,
    change: Callable[[Part, Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Put `change(part, contribution, where)` in the place of the parts' contributions (B, S, D).

    where: (B, S) bool, the chosen positions of the running pass.
    """
    chosen = _check(model, parts)

    def there(part: Part, contribution: Tensor) -> Tensor:
        where = tracker.selected(positions)[:, -contribution.shape[1] :]
        return change(part, contribution, where)

    with ExitStack() as stack:
        tracker = stack.enter_context(PositionTracker.watching(model, positions))
        for part in chosen:
            stack.enter_context(_changing(model, part, there))
        yield


@contextmanager
def _changing(model: PreTrainedModel, part: Part, change: Any) -> Iterator[None]:
    """Put `change(part, contribution)` in the place of a part's contribution (B, S, D)."""
    block: Any = decoder_blocks(model)[part.layer]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(part, output[0]), *output[1:])
        return change(part, output)

    def before_projection(module: nn.Module, args: Any) -> Any:
        heads = args[0].unflatten(-1, (_n_heads(model), -1)).clone()
        heads[..., part.head, :] = change(part, heads[..., part.head, :])
        return (heads.flatten(-2), *args[1:])

    if part.name == "head":
        handle = block.self_attn.o_proj.register_forward_pre_hook(before_projection, prepend=True)
    else:
        module = block.self_attn if part.name == "attention" else block.mlp
        handle = module.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _check(model: PreTrainedModel, parts: Iterable[Part]) -> list[Part]:
    chosen, blocks = sorted(set(parts), key=str), decoder_blocks(model)
    check_reached(model.config, check_layers((part.layer for part in chosen), len(blocks)))
    n_heads = _n_heads(model)
    for part in chosen:
        if part.name == "head" and (part.head is None or not 0 <= part.head < n_heads):
            raise UsageError(f"head {part.head}: blocks have heads 0 to {n_heads - 1}")
        if part.name not in ("attention", "mlp", "head"):
            raise UsageError(f"part {part.name!r}: there are attention, mlp, head")
        for name in ("self_attn", "mlp", "self_attn.o_proj"):
            try:
                blocks[part.layer].get_submodule(name)
            except AttributeError:
                kind = type(blocks[part.layer]).__name__
                raise UsageError(f"{kind} has no `{name}`: parts can't be told apart") from None
    return chosen


def _n_heads(model: PreTrainedModel) -> int:
    decoder: Any = model.get_decoder()
    return int(decoder.config.num_attention_heads)
