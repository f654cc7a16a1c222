"""Sets of decoder blocks, counted from 0: the one place where they are parsed and written.

Residuals are numbered by the block that they enter: h_l enters block l, and h_L leaves the last of
L blocks, before the final norm. So there is one more of them than there are blocks.
"""

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

from torch import Tensor, nn

from melprobe.errors import UsageError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model that has transformers' `get_decoder()`.

    Raises UsageError for a decoder that keeps them elsewhere (GPT-2's `h`).
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(
            f"{type(decoder).__name__} has no list of blocks named `layers`: take a base that has, "
            "such as Llama, Qwen, Mistral, Gemma or Phi"
        )
    return blocks


def parse_residuals(text: str, n_layers: int) -> list[int]:
    """Numbers of residuals, 0 to `n_layers`, from a set such as `"0,7,14-20"`, or `"all"`."""
    if text == "all":
        return list(range(n_layers + 1))
    return parse_layers(text, n_layers + 1, "residuals")


def check_residuals(numbers: Iterable[int], n_layers: int) -> list[int]:
    """Sorted distinct numbers of residuals, 0 to `n_layers`, or UsageError."""
    return check_layers(numbers, n_layers + 1, "residuals")


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual (B, S, D) among the arguments that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_block_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], residual: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another residual."""
    if args:
        return (residual, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": residual}


def parse_layers(text: str, n_layers: int, named: str = "blocks") -> list[int]:
    """`"3,5-8"` to [3, 5, 6, 7, 8]; UsageError when malformed, empty or out of range."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first,)
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            raise UsageError(
                f"layers {text!r}: {part.strip()!r} is not a number or a range like 5-8"
            )
        # Before the range is filled: 0-99999999999 would not fit into memory.
        ends = [int(number) for number in numbers]
        if ends != sorted(ends):
            raise UsageError(f"layers {text!r}: the range {part.strip()!r} runs backwards")
        check_layers(ends, n_layers, named)
        chosen.update(range(ends[0], ends[-1] + 1))
    return check_layers(chosen, n_layers, named)


def check_layers(layers: Iterable[int], n_layers: int, named: str = "blocks") -> list[int]:
    """Sorted distinct layers, all of them inside the model, or UsageError with what there is."""
    try:
        chosen = sorted({index(layer) for layer in layers})
    except TypeError:
        raise UsageError(f"layers {layers!r}: give a set of layers such as {{3, 5}}") from None
    if wrong := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise UsageError(
            f"layers {', '.join(map(str, wrong))}: this model has {named} 0 to {n_layers - 1}"
        )
    return chosen


def format_layers(layers: Iterable[int]) -> str:
    """[3, 5, 6, 7, 8] to `"3,5-8"`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
