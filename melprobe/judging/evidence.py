"""What a verdict rests on: folders of rows, each made by a command that anyone can give again.

Evidence that is there is not made again. What a command says goes into a file beside its folder.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers
from melprobe.judging.question import Question, Run

SKIPPED = {"speech": "speech", "answer": "text"}
"""Evidence of single blocks, and the positions at which they are skipped."""
TOP, COPYING = "top", "copying"


class Evidence(NamedTuple):
    """A folder, and the command that fills it."""

    folder: Path
    module: str
    words: tuple[str, ...]

    @property
    def done(self) -> Path:
        """Is there once the command has ended well."""
        return self.folder.with_suffix(".done")

    @property
    def command(self) -> str:
        return " ".join(["python -m", self.module, *map(shlex.quote, self.words)])


def top_quarter(n_layers: int) -> list[int]:
    """Rounded down, but one block at least."""
    return list(range(n_layers - max(1, n_layers // 4), n_layers))


def ablation(out: Path, what: str, run: Run | None = None) -> Path:
    """Folder of what skipping blocks says: of a run, or of copying."""
    return out / "evidence" / (f"{what}-{run.name}" if run else what)


def capture(out: Path, run: Run) -> Path:
    return out / "evidence" / f"capture-{run.name}"


def probes(out: Path, run: Run) -> Path:
    return out / "evidence" / f"probe-{run.name}"


def between(out: Path, what: str, a: Run, b: Run) -> Path:
    """Folder of what two runs are to each other: `stitch` or `compare`."""
    return out / "evidence" / f"{what}-{a.name}-{b.name}"


def pairs(question: Question) -> Iterator[tuple[Run, Run]]:
    """All that are compared: any two of the arms' runs, and of the runs of nearest WER with those

    of the other arm and each other.
    """
    seen = set()
    for arms in (question.arms, question.arms | question.nearest):
        for a, b in combinations([run for runs in arms.values() for run in runs], 2):
            if (a.name, b.name) not in seen:
                seen.add((a.name, b.name))
                yield a, b


def needed(question: Question, out: Path, n_layers: int) -> list[list[Evidence]]:
    """All of it, in stages: what a stage needs is made by those before."""
    file = question.file
    drawn = ["--data", file.data, "--limit", str(file.clips), "--seed", str(file.seed)]
    drawn += ["--lengths", file.lengths] if file.lengths else []
    first, second = [], []

    def skipping(folder: Path, layers: Sequence[str], *words: str) -> Evidence:
        command = ("--skip-layers", *layers, *words, *drawn, "--out", str(folder))
        return Evidence(folder, "melprobe.ablate", command)

    copying = ablation(out, COPYING)
    first.append(skipping(copying, [], "--copy-text", "--model", file.reader))
    for run in question.runs:
        which = ("--checkpoint", run.given)
        for what, positions in SKIPPED.items():
            folder = ablation(out, what, run)
            first.append(skipping(folder, [], "--positions", positions, *which))
        top = [format_layers(top_quarter(n_layers))]
        first.append(skipping(ablation(out, TOP, run), top, *which))
    if len(question.arms) < 2:
        return [first]
    for run in question.runs:
        folder = capture(out, run)
        words = ("--checkpoint", run.given, *drawn, "--out", str(folder))
        first.append(Evidence(folder, "melprobe.capture", words))
        read = (str(folder), "--labels", file.probe, "--seed", str(file.seed))
        folder = probes(out, run)
        second.append(Evidence(folder, "melprobe.probe", (*read, "--out", str(folder))))
    fit = ("--fit", file.fit, "--fit-limit", str(file.fit_clips))
    for a, b in pairs(question):
        folder = between(out, "stitch", a, b)
        words = (a.given, b.given, *drawn, *fit, "--out", str(folder))
        first.append(Evidence(folder, "melprobe.stitch", words))
        folder = between(out, "compare", a, b)
        words = (str(capture(out, a)), str(capture(out, b)), "--out", str(folder))
        second.append(Evidence(folder, "melprobe.compare", words))
    return [first, second]


def make(stages: Sequence[Sequence[Evidence]], tell: Callable[[Evidence], None], jobs: int) -> None:
    """Make what is missing, `jobs` at a time; `tell` hears of each that has been made.

    UsageError with a command's complaint when one fails; others under way come to an end.
    """
    missing = [[one for one in stage if not one.done.exists()] for stage in stages]
    if not any(missing):
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = get_context("spawn")  # threads and models of this process stay out of it
    with ProcessPoolExecutor(jobs, context, _set_threads, (threads,)) as pool:
        for stage in missing:
            begun = {pool.submit(_make, one): one for one in stage}
            try:
                for future in as_completed(begun):
                    future.result()
                    tell(begun[future])
            except BrokenProcessPool:
                raise UsageError(
                    "a command was ended from outside, perhaps for want of memory; with fewer "
                    "--jobs the same command goes on"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def _make(one: Evidence) -> None:
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        one.folder.with_suffix(".log").open("w") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            import_module(one.module).main(one.words)
        except UsageError as error:
            raise UsageError(f"{one.command}: {error}") from None
    one.done.touch()
