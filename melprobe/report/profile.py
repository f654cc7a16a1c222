"""The profile of a probing study: what can be read from each layer. Computes nothing new."""

import re
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from melprobe.report.svg import COLOURS, WIDE, draw, standalone

FLOOR_STYLES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
COLUMNS = 2
MODEL, MEL, RIDGE = "model", "mel", "ridge"
"""Names that series and probes have in `results.json`."""


def profile(results: Mapping[str, Any]) -> str:
    """An SVG file of a panel for each label, from a probing study's `results.json`."""
    labels = results["labels"]
    text = f"Probes of {results['capture']['checkpoint']}: {', '.join(labels)}, layer by layer."

    def paint(figure: Figure, _: bool) -> None:
        rows = -(-len(labels) // COLUMNS)
        figure.set_figheight((60 + 200 * rows) / 72)
        panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for ax, (name, label) in zip(panels, labels.items(), strict=False):
            _panel(ax, name, label)
        for ax in panels[len(labels) :]:
            ax.remove()
        handles: dict[str, Any] = {}
        for ax in figure.axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=5)

    return standalone(draw("profile", text, paint, WIDE))


def _panel(ax: Axes, name: str, label: Mapping[str, Any]) -> None:
    # Exact times need no word.
    times = [kind for kind in label.get("times", ()) if kind != "exact"]
    ax.set_title(", ".join([name, label["measure"], *(f"times: {kind}" for kind in times[:1])]))
    ax.grid(axis="y")
    ends: tuple[float, ...] = (0, 1)
    by_ridge = [s for s in label["series"] if s["probe"] == RIDGE]
    floors = [s for s in by_ridge if s["series"] not in (MODEL, MEL)]
    for series in label["series"]:
        if series["series"] == MODEL and series["probe"] != RIDGE:
            xs = _places(series["layers"])
            ax.plot(xs, series["score"], color=COLOURS["spare"], linewidth=1, label="logistic")
        elif series["series"] == MODEL:
            xs = ends = _places(series["layers"])
            _line(ax, xs, series)
            if control := series.get("selectivity"):
                ax.plot(xs, control["control"], color=COLOURS["insertions"], label="control task")
    for number, series in enumerate(floors):
        style = FLOOR_STYLES[number % len(FLOOR_STYLES)]
        look: dict[str, Any] = {"color": COLOURS["costly"], "linestyle": style, "linewidth": 1.3}
        ax.plot(_places(series["layers"]), series["score"], label=series["series"], **look)
    for series in by_ridge:
        if series["series"] == MEL:
            look = {"color": COLOURS["muted"], "linestyle": (0, (5, 3)), "linewidth": 1.1}
            ax.axhline(series["score"][0], label="mel patches", **look)
    if label["majority"] is not None:
        look = {"color": COLOURS["muted"], "linestyle": (0, (1, 2)), "linewidth": 1.1}
        ax.axhline(label["majority"], label="commonest class", **look)
    ax.set_xlim(ends[0] - 0.5, ends[-1] + 0.5)
    best = max(max(series["score"]) for series in label["series"])
    tops = [limits[1] for series in label["series"] for limits in series["limits"] if limits]
    # What is far below zero is as useless as zero, and would flatten all the rest.
    ax.set_ylim(bottom=max(ax.get_ylim()[0], -0.25), top=max(1.05 * best, *tops, 0.1))


def _line(ax: Axes, xs: tuple[float, ...], series: Mapping[str, Any]) -> None:
    if all(series["limits"]):
        low, high = zip(*series["limits"], strict=True)
        ax.fill_between(xs, low, high, color=COLOURS["zone"], linewidth=0)
    ax.plot(xs, series["score"], color=COLOURS["spare"], linewidth=1.8, label="model")
    if peak := series.get("peak"):
        at = series["layers"].index(peak["layer"])
        ax.plot(xs[at], series["score"][at], "o", color=COLOURS["spare"], markersize=6)
    ax.set_xlabel("residual h")


def _places(layers: list[str]) -> tuple[float, ...]:
    """h_7 stands at 7, the final norm one to the right of the last."""
    places: list[float] = []
    for layer in layers:
        number = re.fullmatch(r"h_(\d+)", layer)
        places.append(float(number[1]) if number else places[-1] + 1 if places else 0.0)
    return tuple(places)
