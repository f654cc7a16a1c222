"""Captured residuals on disk: what is in the folder, and reading it without the model.

A folder holds `00000.safetensors`, … and, once finished, all that is known of them in `index.json`.
A shard has (N, D) tensors `h_0`, `h_7`, … (h_l enters block l, h_L leaves the last of L blocks,
before the final norm) and for each of the N rows `utterance` (its number among the index's
utterances), `position` (its place in the clip, BOS is 0), `kind` (its number among the index's
kinds) and `seconds` (the middle of the patch, NaN where no patch stands). A clip's rows are in one
shard, in their order.

Neither this file nor `melprobe.shards`, which writes, knows models, hooks or audio.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from melprobe.errors import UsageError
from melprobe.hooks.layers import format_layers

SCHEMA = 1
INDEX = "index.json"
_WHERE = ("shard", "first_row", "rows")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """A capture's index, finished or not; UsageError where it is damaged or another program's."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        schema = index["schema"]
        index["settings"].items()
    except FileNotFoundError:
        raise UsageError(f"{folder}: there is no capture (no {INDEX})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: damaged, or not a capture's; take another folder") from None
    if schema != SCHEMA:
        raise UsageError(f"{path}: of schema {schema}, this version reads {SCHEMA}: capture anew")
    return index


class Capture:
    """A finished capture: which rows there are, and their residuals, read when they are asked for.

    >>> captured = Capture.open(Path("captured"))                     # doctest: +SKIP
    >>> x = captured.residual(14)[captured.rows.query("seconds < 1").index]  # doctest: +SKIP
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.index = index
        """All of `index.json`: settings, versions, patch rate, …"""
        self.numbers: list[int] = index["residuals"]
        """l of each h_l that is there."""
        self.utterances = pd.DataFrame(index["utterances"]).set_index("utterance")
        """By id: text, speaker, duration; shard, first_row and rows."""

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """UsageError where there is no capture, or one that was not finished."""
        index = read_index(Path(folder))
        if not index["finished"]:
            raise UsageError(f"{folder}: not finished; the command that began it goes on with it")
        return cls(Path(folder), index)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """utterance, position, kind, seconds (see the top); row i is row i of every residual."""
        table = {
            name: torch.cat(list(self._pieces(name))).numpy()
            for name in ("utterance", "position", "kind", "seconds")
        }
        for name, names in (
            ("utterance", list(self.utterances.index)),
            ("kind", self.index["kinds"]),
        ):
            table[name] = pd.Categorical.from_codes(table[name], names)
        return pd.DataFrame(table)

    def residual(self, number: int) -> Tensor:
        """h_number of all rows, (N, D), in the dtype it was written in."""
        return torch.cat(list(self.pieces(number)))

    def pieces(self, number: int) -> Iterator[Tensor]:
        """h_number shard by shard, each (n, D): pages come from the disk as they are touched."""
        if number not in self.numbers:
            there = format_layers(self.numbers)
            raise UsageError(f"{self.folder}: h_{number} was not captured; there are {there}")
        return self._pieces(f"h_{number}")

    def clip(self, utterance: str) -> Tensor:
        """All residuals of one utterance's rows, (R, n, D), in the order of `numbers`."""
        shard, first, n = (int(self.utterances.at[utterance, x]) for x in _WHERE)
        start = first - int(self._first_rows[shard])
        with opened(shard_path(self.folder, shard)) as file:
            return torch.stack(
                [file.get_slice(f"h_{number}")[start : start + n] for number in self.numbers]
            )

    @cached_property
    def _first_rows(self) -> "pd.Series[int]":
        """By shard: the number of its first row among all rows."""
        return self.utterances.groupby("shard").first_row.min()

    def _pieces(self, name: str) -> Iterator[Tensor]:
        for shard in range(self.index["shards"]):
            with opened(shard_path(self.folder, shard)) as file:
                yield file.get_tensor(name)


def opened(path: Path) -> Any:
    """A shard that tensors can be had from one by one, inside a `with`."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: missing or damaged ({error}); capture anew") from None
