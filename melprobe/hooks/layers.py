"""Sets of decoder blocks, counted from 0: the one place where they are parsed and written."""

from collections.abc import Iterable

from torch import nn

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


def parse_layers(text: str, n_layers: int) -> list[int]:
    """`"3,5-8"` to [3, 5, 6, 7, 8]; UsageError when malformed, empty or out of range."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"layers {text!r}: {part.strip()!r} is not a number or a range like 5-8"
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise UsageError(f"layers {text!r}: the range {part.strip()!r} runs backwards")
        chosen.update(span)
    return check_layers(chosen, n_layers)


def check_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    """Sorted distinct layers, all of them inside the model, or UsageError with what there is."""
    chosen = sorted(set(layers))
    if wrong := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise UsageError(
            f"layers {', '.join(map(str, wrong))}: this model has blocks 0 to {n_layers - 1}"
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
