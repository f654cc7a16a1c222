"""Errors that a user can mend, and the one place where a command turns them into exit code 2."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn


class UsageError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UsageError`s: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def check_writable(folder: Path, name: str) -> None:
    """UsageError unless files can be made in `folder`, which need not be there yet.

    Asked before the work whose results go there, and leaves nothing behind. `name` goes in front of
    the message. It tries: permissions don't tell root of a read-only disk.
    """
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UsageError(f"{name}: this is a file; name a folder") from None
    except OSError as error:
        raise UsageError(f"{name}: no files can be written there ({error.strerror})") from None
    with suppress(OSError):  # another process may have begun to use it
        for path in new:
            path.rmdir()


def run(main: Callable[[], None], *, resumable: bool = False) -> NoReturn:
    """Run a command's `main`; a `UsageError` becomes one line on stderr and exit code 2.

    So does what the system says of a file or a full disk. `resumable`: the same command goes on
    where it was interrupted.
    """
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        # Raised in a data worker, the message comes as the last line of the worker's traceback.
        line = str(error).strip().splitlines()[-1]
        _complain(re.sub(r"^melprobe(\.\w+)*\.[A-Z]\w*: ", "", line))
        sys.exit(2)
    except BrokenPipeError:  # the reader, such as `head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _complain(f"{error.filename or 'writing failed'}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        _complain(f"interrupted{'; the same command goes on from here' if resumable else ''}")
        sys.exit(130)
    sys.exit(0)


def _complain(line: str) -> None:
    print(f"melprobe: {line}", file=sys.stderr)
