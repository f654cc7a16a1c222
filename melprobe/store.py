"""Result rows: one per run, condition, layer set and utterance, kept in SQLite as they are made.

Every `add` is one transaction in write-ahead mode, so `kill -9` loses only what was not yet added.
The store also keeps the settings a run was made with, and refuses to mix two runs in one folder.
It knows nothing of models or of what the columns mean together: scores are derived elsewhere.
"""

import json
import os
import platform
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pandas as pd

from melprobe.errors import UsageError

PACKAGES = (
    "melprobe",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pandas",
    "jiwer",
    "whisper-normalizer",
    "soundfile",
    "soxr",
)


class Key(NamedTuple):
    """What makes a row unique."""

    run: str
    condition: str
    layer: str
    utterance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One utterance under one condition; sums run over its answer tokens."""

    run: str
    condition: str
    """intact, swapped (is given another clip), or a cut: skip, knock-out, bypass, no-attention,
    no-mlp, no-head, patch, without-lora"""
    layer: str = ""
    """"" for intact and swapped, else what was cut: blocks "7" or "3,5-8", or head "7.2" """
    utterance: str
    positions: str = ""
    """speech, text, all, speech:0.5-1.2, ..., or "" where nothing is cut"""
    speaker: str = ""
    """"" where it is unknown, or a text was read"""
    nll: float
    """teacher-forced negative log-likelihood of the reference, summed, nat"""
    answer_tokens: int
    kl: float
    """KL from the intact model's next-token distribution, summed, nat; 0 when intact"""
    reference: str
    hypothesis: str
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    seconds: float
    """wall time, the batch's shared out: of transcribing; under a cut, of scoring and of what can
    be told of the answer by it"""
    block_influence: float | None = None
    """1 − mean cos(h_l, h_l+1) of the intact model at the study's positions; single layers only"""
    angular_distance: float | None = None
    """mean arccos cos(h_l, h_l+1) / π at the study's positions; single layers only"""
    attribution: float | None = None
    """change of NLL that a patch is to make, to first order, nat; single patched layers only"""


SQL_TYPES = {
    str: "TEXT NOT NULL",
    int: "INTEGER NOT NULL",
    float: "REAL NOT NULL",
    float | None: "REAL",
}
LONGEST_SHOWN = 40
COLUMNS = tuple(field.name for field in fields(Row))


class RowStore:
    """Rows of a run folder's `rows.sqlite`; use as a context manager.

    With `settings`, a store without rows remembers them and the rows of another must have been made
    with the same: `UsageError` names each that differs. Without, a store is opened as it is.
    """

    def __init__(self, path: Path, settings: Mapping[str, object] | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60)
        try:
            self._prepare(settings)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UsageError(f"{path}: not a melprobe store ({error}); use another --out") from None
        except UsageError:
            self._db.close()
            raise

    def _prepare(self, settings: Mapping[str, object] | None) -> None:
        columns = ", ".join(f"{field.name} {SQL_TYPES[field.type]}" for field in fields(Row))  # type: ignore[index]
        key = ", ".join(Key._fields)
        self._db.execute("PRAGMA journal_mode = WAL")
        with self._db:
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS rows ({columns}, PRIMARY KEY ({key})) STRICT"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT) STRICT"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS tried (layers TEXT PRIMARY KEY, damage REAL) STRICT"
            )
        if settings is not None:
            self._keep(settings)

    def _keep(self, settings: Mapping[str, object]) -> None:
        new = {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}
        if not self.done():  # no row was made with whatever settings are there
            old = dict(self._db.execute("SELECT key, value FROM settings"))
            with self._db:
                if old != new:
                    self._db.execute("DELETE FROM tried")
                self._db.execute("DELETE FROM settings")
                self._db.executemany("INSERT INTO settings VALUES (?, ?)", new.items())
            return
        old = dict(self._db.execute("SELECT key, value FROM settings"))
        check_same(self.path.parent, old, new)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows in one transaction: all are there afterwards, or none.

        A row whose key is there already takes the old one's place. NaN raises
        `sqlite3.IntegrityError`: SQLite would keep it as "unknown".
        """
        marks = ", ".join("?" * len(COLUMNS))
        try:
            with self._db:
                self._db.executemany(
                    f"INSERT OR REPLACE INTO rows ({', '.join(COLUMNS)}) VALUES ({marks})",
                    (astuple(row) for row in rows),
                )
        except sqlite3.OperationalError as error:  # a full disk, say
            raise UsageError(f"{self.path}: {error}") from None

    def done(self) -> set[Key]:
        """Keys of all rows that are there, to skip when a run goes on."""
        return {Key(*row) for row in self._db.execute(f"SELECT {', '.join(Key._fields)} FROM rows")}

    def tried(self) -> dict[str, float]:
        """Damage of the sets of blocks that a choice has tried, by label."""
        return dict(self._db.execute("SELECT layers, damage FROM tried"))

    def add_tried(self, layers: str, damage: float) -> None:
        """Remember the damage of a set that was tried."""
        with self._db:
            self._db.execute("INSERT INTO tried VALUES (?, ?)", (layers, damage))

    def frame(self) -> pd.DataFrame:
        """All rows, sorted by key, so that an interrupted run gives the same frame."""
        query = f"SELECT {', '.join(COLUMNS)} FROM rows ORDER BY {', '.join(Key._fields)}"
        frame = pd.DataFrame(self._db.execute(query).fetchall(), columns=list(COLUMNS))
        floats = {f.name: "float64" for f in fields(Row) if f.type in (float, float | None)}
        return frame.astype(floats | {f.name: "int64" for f in fields(Row) if f.type is int})

    def export_parquet(self, path: Path) -> None:
        """Write `frame()` as parquet, atomically."""
        partial = path.with_suffix(".partial")
        self.frame().to_parquet(partial, index=False)
        partial.replace(path)


def check_same(folder: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """UsageError that names each setting in which a folder's differ from those that are given.

    Values are JSON, so that they look the same whichever way they were kept.
    """
    differing = [
        _difference(key, old.get(key, "nothing"), new.get(key, "nothing"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise UsageError(
            f"{folder}: made with other settings ({'; '.join(differing)}); "
            "use another --out, or the same settings to go on"
        )


def _difference(key: str, old: str, new: str) -> str:
    """Both values, unless they are lists or digests that nobody could compare by eye."""
    if max(len(old), len(new)) > LONGEST_SHOWN:
        return f"other {key}"
    return f"{key} = {old} there, {new} now"


def provenance(*, seed: int, command: Sequence[str]) -> dict[str, Any]:
    """What a result needs to be made again; no dates, so that equal runs give equal files.

    `command` holds the command line's words, quoted for a shell where they need it.

    Keys: `versions` (package → version or commit), `hardware`, `seed`, `command`.
    """
    import torch  # only here: a report is rebuilt without torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if commit := _git_commit():
        versions["commit"] = commit
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "gpu": ", ".join(gpus) or "none",
    }
    return {
        "versions": versions,
        "hardware": hardware,
        "seed": seed,
        "command": " ".join(command),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_commit() -> str | None:
    """The commit this file is tracked at, with "+ changes" if the tree differs; else None."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: then it isn't tracked there.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit} + changes" if commit and changed else commit
