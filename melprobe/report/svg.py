"""One style for all figures, and matplotlib's SVG made fit for a page: bytes that repeat, no dates,
ids unique on the page, text as text, colours as CSS variables that serve light and dark alike.
"""

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Light-mode colours; `draw` writes each as the CSS variable of that name (see report.css). Chosen
# to stay apart for colour-blind readers and in grey, and every outcome has its own shape as well.
COLOURS = {
    "paper": "#fdfcf9",
    "ink": "#1c1b19",
    "muted": "#65615a",
    "rule": "#d8d3c8",
    "zone": "#ebe6da",
    "costly": "#b5401c",
    "spare": "#1f639e",
    "open": "#757068",
    "built-in": "#7a756c",
    "substitutions": "#34465a",
    "deletions": "#8ea4b8",
    "insertions": "#e3a33c",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelpad": 6,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 3,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "path.simplify": False,
    "text.parse_math": False,
}
WIDE, NARROW = 760, 350
"""pixels: beside text, and on a phone"""


def draw(name: str, alt: str, paint: Callable[[Figure, bool], None], width: int) -> str:
    """The SVG element that `paint(figure, narrow)` draws; `name` keeps its ids apart."""
    salt = f"{name}-{width}"
    with mpl.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(width / 72, 5), layout="constrained")
        paint(figure, width == NARROW)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{salt}-", text)
    text = re.sub(r"(font(?:-family)?:(?: [\d.]+px)?) [^;\"]*", r"\1 var(--sans)", text)
    for role, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{role})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def standalone(svg: str) -> str:
    """A file of what `draw` made, to be looked at without the report's style sheet, in light."""
    colours = "".join(f"--{role}:{colour};" for role, colour in COLOURS.items())
    style = f"<style>svg{{{colours}--sans:sans-serif;background:var(--paper)}}</style>"
    return svg.replace(">", f">{style}", 1)
