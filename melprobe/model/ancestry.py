"""Which checkpoints a checkpoint owes something to, beyond its base model.

Two models can be compared as a matched pair only if nothing of one went into the other: no weights
to start from, no targets to imitate. So every checkpoint names those that gave it something.
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from melprobe.errors import UsageError

ANCESTORS = "ancestors.json"
Gift = Literal["front and adapter", "adapter", "targets"]


class Ancestor(NamedTuple):
    """A checkpoint that another one owes something to."""

    name: str
    sha256: str
    """of its weights"""
    gave: Gift
    """to the checkpoint itself, or to another of its ancestors"""


def write_ancestors(folder: Path, ancestors: list[Ancestor]) -> None:
    """Leave them in a checkpoint's folder."""
    listed = [ancestor._asdict() for ancestor in ancestors]
    (folder / ANCESTORS).write_text(json.dumps(listed, indent=2) + "\n")


def read_ancestors(folder: Path) -> list[Ancestor]:
    """Of a checkpoint; UsageError where they were never written, or are damaged."""
    path = folder / ANCESTORS
    try:
        return TypeAdapter(list[Ancestor]).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: missing, so it is not known what {folder} grew from") from None
    except ValidationError:
        raise UsageError(f"{path}: damaged; fetch the checkpoint again") from None
