"""A clip's labels over its spectrogram, for a person to check. Computes nothing new.

From top to bottom: log-mel with the patches' edges; words and phones as they are timed; the one
phone and word that each patch has; F0 and energy, by frame (thin) and by patch (steps). Long clips
go on in a second line, as music does.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from melprobe.report.svg import COLOURS, WIDE, draw, standalone

LINE_SECONDS = 3.0
"""At most, of one line: a phone of 50 ms has room for its name."""
HEIGHTS = (140, 105, 84)
"""pixels of spectrogram, labels, curves"""
ROWS = ("words", "phones", "phone of patch", "word of patch", "phones a second")
RANGE = 50 / 4.343
"""50 dB in natural log: what is so far below the loudest is blank, as in Praat."""
PANEL = WIDE - 150
"""pixels that a line is wide, about"""
LETTER = 5.4
"""pixels of a small letter, about"""
GREYS = LinearSegmentedColormap.from_list("greys", [COLOURS["paper"], COLOURS["ink"]])


def draw_track(clip: Mapping[str, Any]) -> str:
    """An SVG file of what `melprobe.probing.picture` says of a clip."""
    end = float(clip["edges"][-1])
    lines = math.ceil(end / LINE_SECONDS)
    times = clip["times"] or ("of unsaid origin" if clip["words"] or clip["phones"] else "none")
    why = f" ({clip['no_times']})" if clip["no_times"] and times == "none" else ""
    about = f"{clip['id']}, {clip['patches_per_second']:g} patches a second, times: {times}{why}"
    said = textwrap.wrap(f"“{clip['text']}”", 105)

    def paint(figure: Figure, _: bool) -> None:
        figure.set_figheight((50 + 16 * len(said) + lines * (sum(HEIGHTS) + 55)) / 72)
        figure.suptitle("\n".join([about, *said]), x=0.01, ha="left", fontsize=11)
        axes = figure.subplots(3 * lines, 1, height_ratios=HEIGHTS * lines, squeeze=False)[:, 0]
        for line in range(lines):
            window = (line * end / lines, (line + 1) * end / lines)
            spectrogram, labels, curves = axes[3 * line :][:3]
            _spectrogram(spectrogram, clip, window)
            _labels(labels, clip, window)
            _curves(curves, clip, window)
        axes[-1].set_xlabel("seconds")

    return standalone(draw("track", f"Labels of {about}: {clip['text']}", paint, WIDE))


def _spectrogram(ax: Axes, clip: Mapping[str, Any], window: tuple[float, float]) -> None:
    mel, frames = clip["mel"], clip["frames"]
    half = (frames[1] - frames[0]) / 2 if len(frames) > 1 else 0.005
    ax.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        interpolation="none",  # matplotlib's own scaling would be to 72 dots an inch
        cmap=GREYS,
        vmin=mel.max() - RANGE,
        vmax=mel.max(),
        extent=(frames[0] - half, frames[-1] + half, 0, mel.shape[1]),
    )
    _patch_edges(ax, clip, window)
    ax.set_ylabel("mel bin")
    ax.set_xlim(window)
    ax.tick_params(labelbottom=False)


def _patch_edges(ax: Axes, clip: Mapping[str, Any], window: tuple[float, float]) -> None:
    patches = clip["patches_per_second"] * (window[1] - window[0])
    width = 0.5 if patches < PANEL / 10 else 0.2
    where = ax.get_xaxis_transform()
    ax.vlines(clip["edges"], 0, 1, COLOURS["costly"], transform=where, linewidth=width)


def _labels(ax: Axes, clip: Mapping[str, Any], window: tuple[float, float]) -> None:
    edges = clip["edges"]
    rows = (
        clip["words"],
        clip["phones"],
        _runs(clip["patch_phones"], edges),
        _runs(clip["patch_words"], edges),
        _runs([f"{rate:.0f}" if rate == rate else None for rate in clip["patch_rate"]], edges),
    )
    for place, spans in enumerate(rows):
        bottom = len(ROWS) - 1 - place
        for label, start, stop in spans:
            _cell(ax, label, (start, stop), bottom, window, filled=place > 1)
    _patch_edges(ax, clip, window)
    ax.set_ylim(0, len(ROWS))
    ax.set_yticks([len(ROWS) - 0.5 - i for i in range(len(ROWS))], ROWS, fontsize=9)
    ax.tick_params(left=False, labelbottom=False)
    ax.set_xlim(window)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _cell(
    ax: Axes,
    label: str,
    span: tuple[float, float],
    bottom: int,
    window: tuple[float, float],
    *,
    filled: bool,
) -> None:
    start, stop = max(span[0], window[0]), min(span[1], window[1])
    if start >= stop:
        return
    box = Rectangle((start, bottom + 0.06), stop - start, 0.88, linewidth=0.6)
    box.set_facecolor(COLOURS["zone"] if filled else "none")
    box.set_edgecolor(COLOURS["muted"])
    ax.add_patch(box)
    room = (stop - start) / (window[1] - window[0]) * PANEL
    size = min(9.0, 9.0 * room / (LETTER * max(len(label), 1)))
    if size >= 5:
        where = ((start + stop) / 2, bottom + 0.47)
        ax.text(*where, label, ha="center", va="center", fontsize=size, clip_on=True)


def _runs(labels: Sequence[str | None], edges: Sequence[float]) -> list[tuple[str, float, float]]:
    """Patches of one label after another, as one; those without a label left out."""
    found, now = [], 0
    for label, group in groupby(labels):
        n = len(list(group))
        if label:
            found.append((label, edges[now], edges[now + n]))
        now += n
    return found


def _curves(ax: Axes, clip: Mapping[str, Any], window: tuple[float, float]) -> None:
    loud = ax.twinx()
    for axis, name, role in ((ax, "f0", "costly"), (loud, "energy", "spare")):
        axis.plot(clip["frames"], clip[name], color=COLOURS[role], linewidth=0.8, alpha=0.6)
        axis.stairs(
            clip[f"patch_{name}"], clip["edges"], baseline=None, color=COLOURS[role], linewidth=1.6
        )
        axis.yaxis.label.set_color(COLOURS[role])
        axis.tick_params(axis="y", labelsize=9)
    ax.set_ylabel("F0, Hz")
    voiced = [hertz for hertz in clip["f0"] if hertz == hertz]
    ax.set_ylim(50, max(sorted(voiced)[-1 - len(voiced) // 50] if voiced else 0, 200) * 1.15)
    loud.set_ylabel("energy, dB")
    loud.spines["right"].set_visible(True)
    ax.set_xlim(window)
