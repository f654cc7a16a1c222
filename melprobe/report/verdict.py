"""The verdict on one page: a row for each block, a column for each line of evidence. Computes
nothing new.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from melprobe.report.notation import listing
from melprobe.report.svg import COLOURS, WIDE, draw, standalone

_LOOKS = {
    "below": ("o", COLOURS["spare"]),
    "above": ("s", COLOURS["costly"]),
    "undecided": ("D", COLOURS["open"]),
}
_TOLD = {"below": "below its margin", "above": "above its margin", "undecided": "undecided"}
_LINES = {
    "exchanged": "exchange",
    "stitched": "stitch",
    "h": "CKA, h",
    "delta": "CKA, Δ",
    "probe": "probe",
}
_ROW, _NARROW_CELL, _LABEL, _WIDE_LABEL = 26, 50, 68, 142
"""pixels"""


class _Column(NamedTuple):
    title: str
    width: float
    group: str


def one_page(verdict: Mapping[str, Any]) -> str:
    """An SVG file, from verdict.json."""
    arms, paired = list(verdict["arms"]), len(verdict["arms"]) > 1
    columns = [_Column("copying", _NARROW_CELL, "")]
    for arm in arms:
        parts = (("speech", _NARROW_CELL), ("answer", _NARROW_CELL), ("need", _LABEL))
        columns += [_Column(title, width, f"{arm}: damage of skipping") for title, width in parts]
    if paired:
        columns += [
            _Column(title, _NARROW_CELL, "between arms: difference") for title in _LINES.values()
        ]
        columns.append(_Column("agreement", _WIDE_LABEL, "between arms: difference"))
    alt = f"Verdict on {len(verdict['layers'])} blocks: need in {' and '.join(arms)}" + (
        ", and agreement between the two." if paired else "."
    )

    def paint(figure: Figure, _: bool) -> None:
        height = _ROW * (len(verdict["layers"]) + 2)
        heads = _heads(verdict)
        figure.set_layout_engine("none")
        total = height + 22 * len(heads) + 56
        figure.set_figheight(total / 72)
        for i, line in enumerate(heads):
            x, y = 12 / WIDE, 1 - (22 + 22 * i) / total
            figure.text(x, y, line, fontsize=13 if i == 0 else 10.5, color=COLOURS["ink"])
        ax = figure.add_axes((0.0, 46 / total, 1.0, height / total))
        _table(ax, verdict, columns)
        _legend(figure, total)

    return standalone(draw("verdict", alt, paint, WIDE))


def _heads(verdict: Mapping[str, Any]) -> list[str]:
    title = "Which blocks are needed for speech"
    title += ", and which are encoder-agnostic?" if len(verdict["arms"]) > 1 else "?"
    lines = [title]
    for arm, runs in verdict["arms"].items():
        rates = ", ".join(f"{100 * run['wer']:.0f}" for run in runs)
        passed = sum(run["gate"]["passed"] for run in runs)
        lines.append(f"{arm}: WER {rates} %; {passed} of {len(runs)} pass the listening gate")
    data = verdict["data"]
    margins = ", ".join(f"{name} {m:g}" for name, m in verdict["asked"]["margins"].items())
    lines.append(f"{data['name']}: {data['n_utterances']} clips; margins: {margins}")
    for arm, found in verdict["top_quarter"].items():
        blocks = listing([str(block) for block in found["blocks"]])
        lines.append(
            f"{arm}: “the top quarter ({blocks}) is not needed for speech, and the rest is”: "
            f"{found['verdict']}"
        )
    return lines


def _table(ax: Axes, verdict: Mapping[str, Any], columns: list[_Column]) -> None:
    layers = verdict["layers"]
    edges, x = [], 40.0
    for column in columns:
        edges.append(x)
        x += column.width
    scale = (WIDE - 50) / (x - 40)
    edges = [40 + (edge - 40) * scale for edge in edges]
    widths = [column.width * scale for column in columns]
    ax.set_xlim(0, WIDE)
    ax.set_ylim(0, _ROW * (len(layers) + 2))
    ax.axis("off")
    top = _ROW * len(layers)
    small: dict[str, Any] = {"fontsize": 9.7, "color": COLOURS["muted"], "va": "center"}
    ax.text(14, top + _ROW / 2, "block", **small, ha="left")
    seen = None
    for column, left, width in zip(columns, edges, widths, strict=True):
        ax.text(left + width / 2, top + _ROW / 2, column.title, **small, ha="center")
        if column.group and column.group != seen:
            ax.text(left + 4, top + 1.5 * _ROW, column.group, **small | {"color": COLOURS["ink"]})
            ax.plot([left, left], [0, top + 1.8 * _ROW], color=COLOURS["rule"], linewidth=0.8)
        seen = column.group
    for row, layer in enumerate(layers):
        y = _ROW * row  # block 0 at the bottom, as the residual flows up
        if row % 2 == 0:
            ax.add_patch(Rectangle((8, y), WIDE - 16, _ROW, color=COLOURS["zone"], linewidth=0))
        ax.text(22, y + _ROW / 2, str(layer["layer"]), ha="center", va="center", fontsize=11)
        if not layer["judged"]:
            told = "not judged: what it writes where speech stands is read by nobody"
            ax.text(edges[0] + 6, y + _ROW / 2, told, **small)
            continue
        for cell, left, width in zip(_cells(verdict, layer), edges, widths, strict=True):
            _cell(ax, cell, left, width, y + _ROW / 2)


def _cells(verdict: Mapping[str, Any], layer: Mapping[str, Any]) -> list[Any]:
    """Labels, and (claim, figure) of lines, in the order of the columns."""
    needs = [layer["need"][arm] for arm in verdict["arms"]]
    cells: list[Any] = [(needs[0]["copying"]["claim"], needs[0]["copying"]["damage"])]
    for need in needs:
        for line in ("speech", "answer"):
            damages = [damage for damage in need[line]["damage"] if damage is not None]
            mean = sum(damages) / len(damages) if damages else None
            cells.append((need[line]["claim"], mean))
        cells.append(need["need"])
    if agreement := layer["agreement"]:
        lines = agreement["lines"]
        cells += [(lines[name]["claim"], lines[name]["difference"]) for name in _LINES]
        cells.append(agreement["agreement"])
    return cells


def _cell(ax: Axes, cell: Any, left: float, width: float, y: float) -> None:
    if isinstance(cell, str):
        weight = "normal" if cell.startswith("undecided") else "bold"
        colour = COLOURS["muted"] if cell.startswith("undecided") else COLOURS["ink"]
        look: dict[str, Any] = {"fontsize": 10, "color": colour, "weight": weight}
        ax.text(left + width / 2, y, cell, ha="center", va="center", **look)
        return
    claim, figure = cell
    marker, colour = _LOOKS[claim]
    ax.plot(left + 9, y, marker, color=colour, markersize=5, fillstyle=_fill(claim))
    told = "" if figure is None else f"{figure:.2f}"
    ax.text(left + width - 4, y, told, ha="right", va="center", fontsize=10)


def _fill(claim: str) -> Any:
    return "none" if claim == "undecided" else "full"


def _legend(figure: Figure, total: float) -> None:
    ax = figure.add_axes((0.0, 0.0, 1.0, 40 / total))
    ax.set_xlim(0, WIDE)
    ax.set_ylim(0, 40)
    ax.axis("off")
    for i, (claim, (marker, colour)) in enumerate(_LOOKS.items()):
        ax.plot(20 + 150 * i, 24, marker, color=colour, markersize=5, fillstyle=_fill(claim))
        ax.text(30 + 150 * i, 24, _TOLD[claim], fontsize=10, va="center", color=COLOURS["muted"])
    told = "in every run of the arm; means of runs are shown"
    ax.text(480, 24, told, fontsize=10, va="center", color=COLOURS["muted"])
