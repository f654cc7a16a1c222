"""Errors that a user can mend, and the one place where a command turns them into exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UsageError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UsageError`s: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; a `UsageError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        # Raised in a data worker, the message comes as the last line of the worker's traceback.
        print(f"melprobe: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("melprobe: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
