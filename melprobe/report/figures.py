"""The report's figures. They place what `results.json` says and compute nothing new."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from melprobe.report import reading, terms, words
from melprobe.report.notation import label_text
from melprobe.report.reading import OUTCOMES, Outcome
from melprobe.report.schema import Interval, Layer, Results
from melprobe.report.svg import COLOURS, NARROW, WIDE, draw

MARKERS: dict[Outcome, str] = {"costly": "s", "spare": "o", "open": "D", "built-in": "o"}
ERRORS = ("substitutions", "deletions", "insertions")
DASHED: dict[str, Any] = {"color": COLOURS["ink"], "linewidth": 0.9, "linestyle": (0, (5, 3))}
DAMAGE_TICKS = (-1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
POINT_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
HIGHEST_BAR = 200
"""errors per 100 words at which a bar is cut: loops can insert thousands"""


@dataclass(frozen=True)
class Drawing:
    """A figure for the page and for a phone, with its words."""

    name: str
    caption: words.Caption
    wide: str
    narrow: str


def drawings(results: Results) -> list[Drawing]:
    """The figures that this run's results carry; none when the listening gate failed."""
    if not results["gate"]["passed"] or not results["layers"]:
        return []
    if not reading.series(results):
        return [_drawing("scale", results)]
    if reading.series(results) == reading.EACH_HEAD:
        return [_drawing("heads", results)]
    names = ["damage", "errors"]
    # They claim to foretell what leaving a block out costs, not reading nor training.
    left_out = results["question"]["cut"] in {"skip", "bypass"}
    if left_out and all(layer["block_influence"] is not None for layer in results["layers"]):
        names.append("similarity")
    return [_drawing(name, results) for name in names]


def _drawing(name: str, results: Results) -> Drawing:
    caption = getattr(words, name)(results)
    paint = partial(PAINTERS[name], results)
    return Drawing(
        name, caption, *(draw(name, caption.alt, paint, width) for width in (WIDE, NARROW))
    )


def damage(results: Results, figure: Figure, narrow: bool) -> None:
    """Normalised damage of each block with its band."""
    figure.set_figheight(360 / 72)
    layers, margin = results["layers"], results["margin"]["damage"]
    gap = results["gate"]["nll_swapped"] - results["gate"]["nll_intact"]
    ax = figure.subplots()
    ax.set_title("damage d")
    ax.grid(axis="y")
    xs = _block_axis(ax, results, narrow)
    low, high = _damage_scale(ax, layers, margin)
    _zone(ax, low, margin)
    ax.axhline(1, **DASHED, zorder=1)
    above = ((-2, 4), ax.get_yaxis_transform(), "offset points")
    ax.annotate(_as_if(results), (1, 1), *above, ha="right", zorder=6)
    _marks(ax, xs, [x["damage"] for x in layers], [x["damage_ci"] for x in layers], results)
    # The same marks in nat: d is ΔNLL over the gap, so this axis only relabels the other.
    nat = ax.twinx()
    _log_beyond(nat, margin * gap, (low * gap, high * gap), DAMAGE_TICKS)
    nat.set_title("ΔNLL, nat per token", loc="right")


def heads(results: Results, figure: Figure, narrow: bool) -> None:
    """Damage of each head as the area of its mark: blocks to the right, heads upwards."""
    layers = results["layers"]
    places = [[int(part) for part in str(layer["layer"]).split(".")] for layer in layers]
    blocks, numbers = sorted({block for block, _ in places}), sorted({head for _, head in places})
    figure.set_figheight((110 + 26 * len(numbers)) / 72)
    ax = figure.subplots()
    ax.set_title("head")
    ax.set_xlabel("block")
    every = 5 if len(blocks) > (12 if narrow else 36) else 1
    ax.set_xticks(range(0, len(blocks), every), map(str, blocks[::every]))
    ax.set_yticks(numbers)
    ax.set_xlim(-0.8, len(blocks) - 0.2)
    ax.set_ylim(numbers[0] - 0.6, numbers[-1] + 0.6)
    ax.tick_params(axis="y", length=0)
    cell = min((NARROW if narrow else WIDE) * 0.86 / (len(blocks) + 0.6), 24)
    largest = max(layer["damage"] or 0.0 for layer in layers)
    for (block, head), layer in zip(places, layers, strict=True):
        share = max(layer["damage"] or 0.0, 0.0) / largest if largest > 0 else 0.0
        kind = reading.outcome(layer, results["margin"]["damage"])
        _mark(ax, [blocks.index(block)], [head], kind, max(2.0, 0.9 * cell * share**0.5))


def errors(results: Results, figure: Figure, narrow: bool) -> None:
    """Change in word error rate with its band, and what the errors are."""
    figure.set_figheight(560 / 72)
    layers, baseline = results["layers"], results["baseline"]
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.1])
    top.set_title("change in word error rate, percentage points")
    top.grid(axis="y")
    xs = _block_axis(top, results, narrow)
    top.set_xlabel("")
    bands = [_times(100, x["delta_wer_ci"]) for x in layers]
    changes = [100 * x["delta_wer"] for x in layers]
    limits = [*changes, *(limit for band in bands if band for limit in band)]
    ends = (min(limits), max(limits))
    _log_beyond(top, 10, (min(1.2 * ends[0], -3), max(1.2 * ends[1], 12)), POINT_TICKS, "+g")
    top.axhline(0, color=COLOURS["muted"], linewidth=0.8, zorder=1)
    _marks(top, xs, changes, bands, results)
    bottom.set_title("errors per 100 reference words")
    bottom.grid(axis="y")
    _block_axis(bottom, results, narrow)
    for x, layer in zip(xs, layers, strict=True):
        _stack(bottom, x, layer, baseline["reference_words"], flat=False)
        if 100 * layer["wer"] > HIGHEST_BAR:
            at, text = (x, HIGHEST_BAR), f"{100 * layer['wer']:.0f} ↑"
            bottom.annotate(text, at, (0, 4), textcoords="offset points", ha="center")
    bottom.set_ylim(0, 1.12 * min(max(100 * x["wer"] for x in layers), HIGHEST_BAR))
    bottom.axhline(100 * baseline["wer"], **DASHED, zorder=5, label="intact")
    _legend(figure, bottom, narrow)


def similarity(results: Results, figure: Figure, narrow: bool) -> None:
    """Block influence and angular distance against measured damage."""
    figure.set_figheight((700 if narrow else 360) / 72)
    layers, margin = results["layers"], results["margin"]["damage"]
    damages = [x["damage"] for x in layers]
    counted = [x for x in layers if not x["zero_by_construction"]]
    panels = zip(
        figure.subplots(*((2, 1) if narrow else (1, 2))),
        ("block_influence", "angular_distance"),
        ("block influence", "angular distance, half turns"),
        strict=True,
    )
    for ax, column, label in panels:
        xs: list[float] = [layer[column] for layer in layers]  # type: ignore[literal-required]
        ax.set_title("measured damage d")
        ax.set_xlabel(label)
        ax.grid(axis="y")
        low, _ = _damage_scale(ax, layers, margin)
        _zone(ax, low, margin)
        _marks(ax, xs, damages, [None] * len(xs), results)
        if min(xs) > 0 and max(xs) > 20 * min(xs):
            ax.set_xscale("log")
            ax.set_xlabel(f"{label}, logarithmic")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.margins(x=0.08)
        marks = [(layer[column], layer["damage"] or 0.0) for layer in layers]  # type: ignore[literal-required]
        worst = reading.by_damage(counted)[:4]
        _name(ax, {str(layer["layer"]): marks[layers.index(layer)] for layer in worst}, marks)


def _name(
    ax: Axes, names: Mapping[str, tuple[float, float]], marks: Sequence[tuple[float, float]]
) -> None:
    """Write each name beside its mark, on the first side where no other mark or name stands."""
    points = 72 / ax.figure.dpi
    taken = [points * ax.transData.transform(mark) for mark in marks]
    for name, at in names.items():
        here = points * ax.transData.transform(at)
        centres = [here + side for side in ((0, 11), (12, 0), (-12, 0), (0, -11))]
        free = [all(max(abs(centre - other)) > 8 for other in taken) for centre in centres]
        centre = centres[free.index(True) if any(free) else 0]
        taken.append(centre)
        aside = tuple(centre - here)
        ax.annotate(name, at, aside, textcoords="offset points", ha="center", va="center", zorder=6)


def scale(results: Results, figure: Figure, narrow: bool) -> None:
    """One set of blocks: its place between intact and deaf, and what its errors are."""
    figure.set_figheight((400 if narrow else 330) / 72)
    layer, margin, baseline = results["layers"][0], results["margin"]["damage"], results["baseline"]
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.6])
    top.set_title("damage d")
    low, high = layer["damage_ci"] or (0.0, 0.0)
    left = min(-0.03, low - 0.03)
    top.set_xlim(left, max(1.04, high * 1.05))
    top.set_ylim(-1, 1)
    top.set_yticks([])
    top.spines["left"].set_visible(False)
    top.axvspan(left, margin, color=COLOURS["zone"], linewidth=0, zorder=0)
    note = f"margin {margin:g}"
    top.annotate(note, (margin, -0.9), (5, 0), textcoords="offset points", color=COLOURS["muted"])
    for x, label, shift, side in ((0, "intact", 6, "left"), (1, _as_if(results), -6, "right")):
        top.axvline(x, **DASHED, zorder=1)
        top.annotate(label, (x, 0.7), (shift, 0), textcoords="offset points", ha=side)
    kind = reading.outcome(layer, margin)
    top.hlines(0, low, high, color=COLOURS[kind], linewidth=2, zorder=3)
    _mark(top, [layer["damage"] or 0.0], [0], kind)
    bottom.set_title("errors per 100 reference words")
    bottom.grid(axis="x")
    _stack(bottom, 0, baseline, baseline["reference_words"], flat=True)
    _stack(bottom, 1, layer, baseline["reference_words"], flat=True)
    deaf = 100 * results["gate"]["wer_swapped"]
    bottom.barh(2, deaf, 0.56, facecolor="none", edgecolor=COLOURS["muted"], linewidth=1)
    changed = f"{terms.cut(results).verb} {label_text(layer['layer'])}"
    bottom.set_yticks([0, 1, 2], ["intact", changed, f"other {terms.medium(results).one}"])
    bottom.invert_yaxis()
    bottom.spines["left"].set_visible(False)
    bottom.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    _legend(figure, bottom, narrow)


def _as_if(results: Results) -> str:
    return f"as if {terms.medium(results).deaf}"


PAINTERS = {
    "damage": damage,
    "heads": heads,
    "errors": errors,
    "similarity": similarity,
    "scale": scale,
}


def _block_axis(ax: Axes, results: Results, narrow: bool) -> list[int]:
    xs = [reading.where_on_axis(results, layer) for layer in results["layers"]]
    ax.set_xticks(sorted(xs)[:: 5 if len(xs) > (12 if narrow else 36) else 1])
    ax.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    which = reading.SERIES.get(reading.series(results), "block {1}")
    size = results["question"]["layers"].partition(":")[2]
    ax.set_xlabel(which.format(size, terms.cut(results).done))
    if reading.series(results) == "picks":
        ways = ["\n".join(layer["picked_by"]) for layer in results["layers"]]
        ax.set_xticks(xs, ways)
    return xs


def _log_beyond(
    ax: Axes, linear: float, ends: Interval, ticks: Sequence[float], form: str = "g"
) -> None:
    """Linear within ±`linear`, logarithmic beyond: a hundredfold apart, all stay readable."""
    ax.set_yscale("symlog", linthresh=linear, linscale=0.8)
    ax.set_ylim(*ends)
    # Where the linear part is wide, the least of them would be written over each other and zero.
    shown = [t for t in ticks if ends[0] <= t <= ends[1] and (not t or abs(t) >= linear / 5)]
    ax.yaxis.set_major_locator(FixedLocator(shown))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticklabels([f"{t:{form}}".replace("-", "−") if t else "0" for t in shown])


def _damage_scale(ax: Axes, layers: Sequence[Layer], margin: float) -> Interval:
    bands = [layer["damage_ci"] or (0.0, 0.0) for layer in layers]
    low = min(-0.6 * margin, *(1.3 * band[0] for band in bands))
    ends = (low, max(1.4, *(1.25 * band[1] for band in bands)))
    _log_beyond(ax, margin, ends, DAMAGE_TICKS)
    return ends


def _zone(ax: Axes, low: float, margin: float) -> None:
    ax.axhspan(low, margin, color=COLOURS["zone"], linewidth=0, zorder=0)
    ax.axhline(0, color=COLOURS["muted"], linewidth=0.8, zorder=1)


def _marks(
    ax: Axes,
    xs: Sequence[float],
    ys: Sequence[float | None],
    bands: Sequence[Interval | None],
    results: Results,
) -> None:
    kinds = [reading.outcome(x, results["margin"]["damage"]) for x in results["layers"]]
    for x, band, kind in zip(xs, bands, kinds, strict=True):
        if band:
            ax.vlines(x, *band, color=COLOURS[kind], linewidth=1.7, zorder=3)
    for kind in OUTCOMES:
        at = [(x, y) for x, y, k in zip(xs, ys, kinds, strict=True) if k == kind and y is not None]
        if at:  # an empty line has no box, and the layout would make room for nowhere
            _mark(ax, [x for x, _ in at], [y for _, y in at], kind)


def _mark(
    ax: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    kind: Outcome,
    size: float | None = None,
) -> None:
    ax.plot(
        xs,
        ys,
        linestyle="none",
        marker=MARKERS[kind],
        markersize=size or {"built-in": 4.5, "open": 5.5}.get(kind, 6),
        markerfacecolor=COLOURS["paper" if kind in ("open", "built-in") else kind],
        markeredgecolor=COLOURS[kind],
        markeredgewidth=1.3,
        zorder=4,
        clip_on=False,
    )


def _stack(ax: Axes, at: float, row: Mapping, words: int, *, flat: bool) -> None:
    start, bar = 0.0, (ax.barh if flat else ax.bar)
    for name in ERRORS:
        length = min(100 * row[name] / words, HIGHEST_BAR - start)
        bar(at, length, 0.56 if flat else 0.72, start, color=COLOURS[name], label=name, zorder=3)
        start += length


def _legend(figure: Figure, ax: Axes, narrow: bool) -> None:
    handles, labels = ax.get_legend_handles_labels()
    one_each = dict(zip(labels, handles, strict=True))
    figure.legend(
        one_each.values(), one_each.keys(), loc="outside lower left", ncols=2 if narrow else 4
    )


def _times(factor: float, ends: Interval | None) -> Interval | None:
    return ends and (factor * ends[0], factor * ends[1])
