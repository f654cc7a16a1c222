"""One self-contained HTML page from a run folder: no outside request, the same bytes every time.

Reads `results.json`, `rows.parquet` and `audio/*.flac` of the folder and nothing else. All text
from data is escaped; a content security policy refuses any script but the page's own.
"""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from melprobe.analysis.gate import GATE_NAT, GATE_WER
from melprobe.report import reading, schema, terms, words
from melprobe.report.examples import examples
from melprobe.report.figures import drawings
from melprobe.report.notation import interval, label_text, names, number, percent, points

TEMPLATES = files("melprobe.report") / "templates"
FONTS = {
    # file stem: (family, style, CSS unicode-range)
    "source-serif-4-latin-wght-normal": ("Serif", "normal", "latin"),
    "source-serif-4-latin-wght-italic": ("Serif", "italic", "latin"),
    "source-serif-4-greek-wght-normal": ("Serif", "normal", "greek"),
    "source-sans-3-latin-wght-normal": ("Sans", "normal", "latin"),
    "source-sans-3-greek-wght-normal": ("Sans", "normal", "greek"),
}
RANGES = {
    "latin": "U+0000-00FF,U+0131,U+0152-0153,U+2000-206F,U+2191,U+2193,U+2212",
    "greek": "U+0370-03FF",
}


def render(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    `UsageError` if results or rows are missing, unreadable or of another schema version.
    """
    results, rows = schema.load(run_dir)
    script = (TEMPLATES / "report.js").read_text()
    environment = Environment(
        loader=PackageLoader("melprobe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        {f.__name__: f for f in (interval, label_text, names, number, percent, points)}
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        reading=reading,
        terms=terms,
        gate_nat=GATE_NAT,
        gate_wer=GATE_WER,
        words=words,
        cut=terms.cut(results),
        outcomes=[reading.outcome(x, results["margin"]["damage"]) for x in results["layers"]],
        drawings=drawings(results),
        examples=examples(run_dir, results, rows),
        css=_font_faces() + (TEMPLATES / "report.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = run_dir / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _font_faces() -> str:
    faces = []
    for stem, (family, style, script) in FONTS.items():
        data = base64.b64encode((TEMPLATES / "fonts" / f"{stem}.woff2").read_bytes()).decode()
        faces.append(
            f'@font-face{{font-family:"melprobe {family}";font-style:{style};'
            f"font-weight:200 900;unicode-range:{RANGES[script]};"
            f'src:url(data:font/woff2;base64,{data}) format("woff2")}}\n'
        )
    return "".join(faces)
