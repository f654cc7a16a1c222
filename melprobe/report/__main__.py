"""`python -m melprobe.report RUN`: build a run's report again from its rows, without torch."""

from collections.abc import Sequence
from pathlib import Path

from melprobe.errors import Parser, run
from melprobe.report.html import render


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m melprobe.report",
        description="Build report.html again from a run's results.json, rows.parquet and audio.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, e.g. reports/skip")
    print(render(parser.parse_args(argv).run))


if __name__ == "__main__":
    run(main)
