"""`python -m melprobe.study NAME --size mini`: one of the paper's experiments, from its recipes.

Trains every arm with several seeds, tests all on the same clips, and writes one table: word error
rates with intervals over runs and speakers, the paper's figures beside them, and whether the order
agrees. Runs are shared between studies and lie under runs/studies; stopped and started again, a
study goes on where it was. --dry-run checks every recipe and says what the study would take.
"""

import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from melprobe.analysis.study import swap_partners
from melprobe.errors import Parser, UsageError, check_writable, run
from melprobe.folders import replace_files
from melprobe.report.studies import markdown
from melprobe.store import provenance
from melprobe.studies.budget import budget, check_layers
from melprobe.studies.paper import STUDIES
from melprobe.studies.running import Run, carry_out, plan
from melprobe.studies.sizes import read_size, within
from melprobe.studies.table import all_rows, findings


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, train, test, write."""
    words = list(sys.argv[1:] if argv is None else argv)
    p = Parser(prog="python -m melprobe.study", description=__doc__)
    p.add_argument("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    p.add_argument("--size", required=True, help="mini, smol, full, or a file like theirs")
    p.add_argument("--seeds", type=int, help="training runs of each arm (the size's own number)")
    p.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where runs lie")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (1); two suit two cores")
    p.add_argument("--out", type=Path, help="folder of the table; by default under reports/")
    p.add_argument("--dry-run", action="store_true", help="what it would take, and no more")
    options = p.parse_args(words)
    size = read_size(options.size)
    seeds = size.seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: take 1 or more")
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: take 1 or more")
    check_layers(size)
    study = STUDIES[options.name](size)
    runs = plan(study, size, seeds, options.runs)
    if options.dry_run:
        print(budget(runs, size))
        return
    out = options.out or Path("reports") / f"study-{study.name}-{Path(options.size).stem}"
    check_writable(out, f"--out {out}")
    check_writable(options.runs, f"--runs {options.runs}")
    drawn = size.test.drawn()
    swap_partners(drawn)  # refused before the training rather than after
    if study.lengths and not any(within(u.duration, span) for u in drawn for span in study.lengths):
        raise UsageError(f"{options.size}: lengths: no clip of {size.test.manifest} is so long")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(study.name, total=2 * len(runs))
        done = count()

        def tell(run: Run, doing: str) -> None:
            now = f"{doing} {run.arm.name}, seed {run.seed}"
            progress.update(bar, description=now, completed=next(done))

        carry_out(runs, size, tell, options.jobs)
    results = {
        **findings(study, runs),
        "size": options.size,
        "test": {
            "name": size.test.manifest,
            "clips": len(drawn),
            "speakers": len({u.speaker for u in drawn if u.speaker}),
        },
        **provenance(seed=0, command=["python -m melprobe.study", *words]),
    }

    def write(folder: Path) -> None:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "report.md").write_text(markdown(results))
        all_rows(runs).to_parquet(folder / "rows.parquet", index=False)

    replace_files(out, write)
    print(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    run(main, resumable=True)
