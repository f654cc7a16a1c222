"""Where downloads and built corpora live: `$MELPROBE_CACHE`, else `~/.cache/melprobe`."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from melprobe.errors import UsageError


def cache_dir(*parts: str) -> Path:
    """A folder under the cache, made if it is missing. Raises UsageError where it can't be."""
    root = os.environ.get("MELPROBE_CACHE") or Path.home() / ".cache" / "melprobe"
    folder = Path(root).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made ({error.strerror}); set MELPROBE_CACHE to a folder that can"
            " be written"
        ) from None
    return folder


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(empty folder)` unless it is there: whole, or not at all.

    A killed run leaves only a `.part` folder, which the next run empties; a second process
    waits for the first.
    """
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            part.rename(folder)
    return folder
