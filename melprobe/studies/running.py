"""Training and testing a study's arms: each recipe once, whichever studies ask for it.

A run lies in a folder named after its recipe, so that studies share what they have in common, and a
study that was stopped goes on. Training and testing have processes of their own: compiled code and
caches of one would weigh on the next.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers
from melprobe.studies.paper import Arm, Study
from melprobe.studies.sizes import Size
from melprobe.training.recipe import SpeechRecipe

_under_way: set[subprocess.Popen[bytes]] = set()


class Run(NamedTuple):
    """One arm with one seed."""

    arm: Arm
    seed: int
    recipe: SpeechRecipe
    needs: Path | None = None
    """Folder of the run that it starts from, or that teaches it."""

    @property
    def folder(self) -> Path:
        return self.recipe.out

    @property
    def checkpoint(self) -> Path:
        """After the last step: none is chosen by how it did, so that all cost the same."""
        return self.folder / "last"

    @property
    def rows(self) -> Path:
        """What it transcribed, in a file for each way it was tested."""
        off = self.arm.without_lora
        return self.folder / (f"rows-off-{format_layers(off)}.jsonl" if off else "rows.jsonl")


def plan(study: Study, size: Size, seeds: int, runs: Path) -> list[Run]:
    """All runs of a study, seed by seed and in the order of its arms."""
    planned: dict[tuple[str, int], Run] = {}
    for seed in range(seeds):
        for arm in study.arms:
            changes, start = dict(arm.changes), None
            if arm.start:  # named apart from where the runs lie, which may be moved
                start = planned[arm.start, seed]
                changes[arm.start_field] = start.folder.name
            digest = _digest(size.with_changes(changes, runs / arm.name, seed))
            if start:
                changes[arm.start_field] = str(start.checkpoint)
            recipe = size.with_changes(changes, runs / f"{digest}-seed{seed}", seed)
            planned[arm.name, seed] = Run(arm, seed, recipe, start and start.folder)
    return list(planned.values())


def _digest(recipe: SpeechRecipe) -> str:
    fields = recipe.model_dump(mode="json", exclude={"out", "seed", "keep"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def train(run: Run, jobs: int = 1) -> None:
    """Train it, or go on; does nothing when it has ended. UsageError when it fails."""
    if run.checkpoint.is_dir():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "recipe.yaml"
    path.write_text(run.recipe.model_dump_json(indent=2) + "\n")  # JSON is YAML
    log = run.folder / "train.log"
    _python("melprobe.train", str(path), log=log, what=_name(run), jobs=jobs)


def test(run: Run, size: Size, jobs: int = 1) -> None:
    """Transcribe the size's test clips; does nothing when that was done, of the same clips."""
    if rows_of(run, size):
        return
    words = ["--manifest", size.test.manifest, "--clips", str(size.test.clips)]
    words += ["--checkpoint", str(run.checkpoint), "--rows", str(run.rows)]
    if size.test.max_seconds:
        words += ["--max-seconds", str(size.test.max_seconds)]
    if run.arm.without_lora:
        words += ["--without-lora", format_layers(run.arm.without_lora)]
    log = run.folder / "test.log"
    _python("melprobe.studies.testing", *words, log=log, what=_name(run), jobs=jobs)


def rows_of(run: Run, size: Size) -> list[dict[str, Any]]:
    """What it transcribed; none where a row is broken or the clips are not the size's."""
    try:
        rows = [json.loads(line) for line in run.rows.read_text().splitlines()]
        of = [(row["audio_filepath"], row["text"], row["speaker"]) for row in rows]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
    return rows if of == [(str(u.id), u.text, u.speaker) for u in size.test.drawn()] else []


def _name(run: Run) -> str:
    return f"{run.arm.name}, seed {run.seed}"


def _command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _python(module: str, *words: str, log: Path, what: str, jobs: int) -> None:
    """Run a module with its share of the cores; UsageError with its last words when it fails."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    before = log.stat().st_size if log.exists() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(
            _command(module, *words),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
        ) as process,
    ):
        _under_way.add(process)
        process.wait()
        _under_way.remove(process)
    if process.returncode:
        told = log.read_bytes()[before:].decode(errors="replace")
        lines = [line for line in told.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {process.returncode}"
        if process.returncode < 0:  # its last words are of something else
            said = f"ended from outside, {signal.strsignal(-process.returncode)}"
        raise UsageError(f"{what}: {said} (all of it: {log})")


def seconds_of(run: Run) -> float:
    """What its training took; UsageError where the log that its checkpoint brings is damaged."""
    log = run.checkpoint / "log.jsonl"
    try:
        return float(json.loads(log.read_text().splitlines()[-1])["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(
            f"{log}: missing or damaged; delete {run.folder}, and it is trained anew"
        ) from None


def carry_out(
    runs: Sequence[Run], size: Size, tell: Callable[[Run, str], None], jobs: int = 1
) -> None:
    """Train and test what is missing, `jobs` at a time; `tell` hears of each before it is begun.

    When one fails, those that are under way come to their end, and no other is begun; when it is
    interrupted, they are stopped.
    """
    waiting: dict[Path, list[Run]] = {}  # those that share a recipe, one after the other
    for run in runs:
        waiting.setdefault(run.folder, []).append(run)

    def one(sharing: Sequence[Run]) -> None:
        for run in sharing:
            tell(run, "training")
            train(run, jobs)
            tell(run, "testing")
            test(run, size, jobs)

    begun: dict[Future[None], Path] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or begun:
                missing = {*waiting, *begun.values()}
                ready = [folder for folder, own in waiting.items() if own[0].needs not in missing]
                for folder in ready[: jobs - len(begun)]:
                    begun[pool.submit(one, waiting.pop(folder))] = folder
                ended, _ = wait(begun, return_when=FIRST_COMPLETED)
                for future in ended:
                    del begun[future]
                    future.result()
        except KeyboardInterrupt:
            # Again and again: one that is just being started isn't known yet.
            while wait(begun, timeout=0.1).not_done:
                for process in _under_way.copy():
                    process.terminate()
            raise
