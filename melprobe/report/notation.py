"""How the report writes blocks, heads, sets, numbers and intervals."""

from collections.abc import Sequence

from melprobe.report.schema import Interval, Layer


def sentence(text: str) -> str:
    """With a capital letter in front; `str.capitalize` would make "lora" of LoRA."""
    return text[:1].upper() + text[1:]


def places(positions: str) -> str:
    """ "speech positions from 0.5 to 1.2 s" """
    name, _, times = positions.partition(":")
    return f"{name} positions" + (f" from {times.replace('-', ' to ')} s" if times else "")


def names(layers: Sequence[Layer], *, ordered: bool = False) -> str:
    """ "block 29", "blocks 0, 1 and 12–28"; `ordered` keeps the order given and makes no ranges."""
    labels = [layer["layer"] for layer in layers]
    if heads := [label for label in labels if "." in str(label)]:
        return f"head{'s' * (len(heads) > 1)} {_heads(heads)}"
    if any(isinstance(label, str) for label in labels):
        return f"blocks {', '.join(label_text(label) for label in labels)}"
    numbers = [label for label in labels if isinstance(label, int)]
    parts = [str(n) for n in numbers] if ordered else ranges(numbers)
    return f"block{'s' if len(labels) > 1 else ''} {listing(parts)}"


def _heads(labels: Sequence[int | str]) -> str:
    """ "3.0 and 14.2–14.5": heads of one block that follow each other become a range."""
    of_block: dict[str, list[int]] = {}
    for label in labels:
        block, _, head = str(label).partition(".")
        of_block.setdefault(block, []).append(int(head))
    return listing(
        [
            "–".join(f"{block}.{head}" for head in part.split("–"))
            for block, heads in of_block.items()
            for part in ranges(heads)
        ]
    )


def label_text(label: int | str) -> str:
    """A layer or set as it is shown: "7", "3, 5–8"."""
    return str(label).replace("-", "–").replace(",", ", ")


def ranges(numbers: Sequence[int]) -> list[str]:
    """[0, 1, 12, 13, 14] → ["0", "1", "12–14"]: runs of three and more become a range."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return [
        part
        for run in runs
        for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run))
    ]


def listing(parts: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits, with a true minus sign, no "−0.00", and an en dash for None."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """0.1834 → "18.3 %", with a no-break space."""
    return f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    """A difference of rates in percentage points, always signed."""
    text = number(100 * value, 1)
    return text if text.startswith("−") or text == "0.0" else f"+{text}"


def equals(value: float | str) -> str:
    """ "d = 0.05", kept on one line."""
    shown = value if isinstance(value, str) else number(value)
    return f"d\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{shown}"


def interval(ci: Interval | None, digits: int = 2, scale: float = 1.0) -> str:
    """ "[0.12, 0.34]", and "[–]" for None"""
    return "[–]" if ci is None else f"[{', '.join(number(scale * end, digits) for end in ci)}]"
