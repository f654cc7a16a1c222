"""The heat map of a comparison: CKA of every layer with every layer, as `results.json` says it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from melprobe.report.svg import WIDE, draw, standalone

_SHADES = LinearSegmentedColormap.from_list("cka", ["#f3efe4", "#8fb0cf", "#1f639e", "#0b2745"])
_NAMES = {"h": "residuals h", "delta": "what blocks add, Δ"}
_WHAT = {
    "within": "within one model",
    "between": "between two models",
    "mel": "of a model with raw mel patches",
}
_TICKS = 8
"""on an axis at most"""


def heat_map(results: Mapping[str, Any]) -> str:
    """A whole SVG file: one panel for each view, shades from 0 to 1, lower values as 0."""
    grids = results["grids"]
    what = _WHAT[results["kind"]]
    alt = f"Debiased linear CKA {what}, every layer with every layer, in {len(grids)} panels."

    def paint(figure: Figure, narrow: bool) -> None:
        rows = (len(grids) + 1) // 2
        tallest = max(len(grid["layers_a"]) / len(grid["layers_b"]) for grid in grids)
        figure.set_figheight((rows * (75 + 335 * min(tallest, 1.3)) + 60) / 72)
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for ax, grid in zip(panels, grids, strict=False):
            mesh = _panel(ax, grid, results)
        bar = figure.colorbar(mesh, ax=list(figure.axes), location="bottom", shrink=0.4, aspect=30)
        bar.set_label("CKA")

    return standalone(draw("similarity", alt, paint, WIDE))


def _panel(ax: Axes, grid: Mapping[str, Any], results: Mapping[str, Any]) -> Any:
    cka = np.array(grid["cka"], np.float64)  # None becomes NaN, which is left blank
    ax.set_title(f"{_NAMES[grid['of']]}, {grid['scaling']}")
    mesh = ax.pcolormesh(cka, cmap=_SHADES, vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
    ax.set_aspect("auto" if results["kind"] == "mel" else "equal")
    ax.set_xlabel({"within": "layer", "between": "layer of B", "mel": "mel"}[results["kind"]])
    ax.set_ylabel("layer of A" if results["kind"] == "between" else "layer")
    for set_ticks, layers in ((ax.set_xticks, "layers_b"), (ax.set_yticks, "layers_a")):
        places = _ticks(grid[layers])
        set_ticks([i + 0.5 for i in places], [str(grid[layers][i]) for i in places])
    ax.tick_params(length=0)
    return mesh


def _ticks(layers: Sequence[int]) -> list[int]:
    """Places of the layers that are written on an axis."""
    every = -(-len(layers) // _TICKS)
    return list(range(0, len(layers), every))
