"""Folders that are whole or not there.

A folder is written beside the old one and then put in its place, so that a run which is killed at
any moment finds a whole one when it starts again.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from melprobe.errors import UsageError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from holding the folder; UsageError while one does.

    It is free again when the process ends in whatever way. Its children don't hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder}: another process is at work there; wait for it") from None
        yield


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, then put it in the old one's place."""
    draft, old = draft_of(folder), _beside(folder, "old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, then put its files into `folder`, where others stay."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    folder.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        file.replace(folder / file.name)
    draft.rmdir()


def draft_of(folder: Path) -> Path:
    """Where a folder that is being replaced is written, for others who write into it as well."""
    return _beside(folder, "draft")


def recover_folder(folder: Path) -> bool:
    """Whether the folder is there; one whose replacement was cut off is put back."""
    old = _beside(folder, "old")
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    return folder.exists()


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")
