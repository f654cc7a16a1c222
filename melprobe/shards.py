"""Captured residuals to disk, in shards, while a model runs; `melprobe.captured` reads them.

It takes what forward passes gave and writes in a thread of its own, so that the passes don't wait.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from melprobe.captured import INDEX, SCHEMA, opened, read_index, shard_path
from melprobe.errors import UsageError
from melprobe.store import check_same

_WAITING = 1
"""Passes that may wait for the disk; the next one waits for them, so memory is bounded."""


@dataclass(frozen=True, slots=True)
class Caught:
    """What one forward pass gave: N rows, clip after clip, each clip's in their order."""

    numbers: Sequence[int]
    """of the residuals, rising"""
    residuals: Tensor
    """(R, N, D): h_l for each l of `numbers`"""
    clip: Tensor
    """(N,) the row's place in the batch"""
    position: Tensor
    """(N,) its place in the clip without padding: BOS is 0"""
    kind: Tensor
    """(N,) a `melprobe.hooks.positions.Kind`"""
    seconds: Tensor
    """(N,) middle of the patch, NaN where no patch stands"""

    def h(self, number: int) -> Tensor:
        """h_number, (N, D)."""
        return self.residuals[self.numbers.index(number)]

    def cpu(self) -> "Caught":
        tensors = (self.residuals, self.clip, self.position, self.kind, self.seconds)
        return Caught(self.numbers, *(tensor.cpu() for tensor in tensors))


class _Open:
    """The shard that is being filled; its memory serves one shard after another."""

    def __init__(self, like: Caught, room: int):
        """room: for so many rows."""
        n, _, width = like.residuals.shape
        self.numbers, self.room = like.numbers, room
        try:
            self.residuals = like.residuals.new_empty(n, room, width)  # (R, room, D)
            self.columns = {
                "utterance": torch.empty(room, dtype=torch.int64),
                "position": torch.empty(room, dtype=torch.int32),
                "kind": torch.empty(room, dtype=torch.uint8),
                "seconds": torch.empty(room, dtype=torch.float32),
            }
        except (RuntimeError, TypeError):  # TypeError: more than 2^63
            size = n * room * width * like.residuals.itemsize / 1e6
            raise UsageError(
                f"there is no memory for a shard of {size:.3g} MB: take a smaller one"
            ) from None
        self.counts: list[tuple[int, int]] = []
        """Numbers of utterances, and how many rows each has."""
        self.n = 0

    def put(self, caught: Caught, rows: slice, number: int) -> None:
        """Add the rows of an utterance."""
        here = slice(self.n, self.n + rows.stop - rows.start)
        # By numpy: torch would wake threads that the forward pass needs.
        _bytes(self.residuals)[:, here] = _bytes(caught.residuals)[:, rows]
        self.columns["utterance"][here] = number
        for name in ("position", "kind", "seconds"):
            self.columns[name][here] = getattr(caught, name)[rows]
        self.counts.append((number, here.stop - here.start))
        self.n = here.stop

    def tensors(self) -> dict[str, Tensor]:
        rows = {f"h_{x}": h[: self.n] for x, h in zip(self.numbers, self.residuals, strict=True)}
        return rows | {name: column[: self.n] for name, column in self.columns.items()}

    def clear(self) -> None:
        self.counts, self.n = [], 0


def _bytes(residuals: Tensor) -> np.ndarray:
    """(R, N, D) of any dtype as bytes, (R, N, D times its size); shares its memory."""
    return residuals.view(torch.uint8).numpy()


class CaptureWriter:
    """Writes a capture in a thread of its own, inside a `with`; stopped anywhere, it can go on.

    A shard or an index is there whole or not at all. What was caught and not yet in a shard when
    the `with` was left by an error is written by the run that goes on, into the same shard.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        utterances: Sequence[Mapping[str, Any]],
        shard_mb: float,
    ):
        """settings: what a run that goes on must have in common with the one that began.

        about: whatever else stands in the index. utterances: what it says of each, by number.
        Raises UsageError where the folder holds something else, or another process writes to it.
        """
        self.folder = folder
        self.settings, self.about, self.utterances = dict(settings), dict(about), utterances
        self.shard_bytes = int(shard_mb * 1e6)
        self.shards: list[list[tuple[int, int]]] = []
        """Of each shard that is there, its utterances' numbers and how many rows each has."""
        self.done: set[int] = set()
        self._finished = False
        self._open: _Open | None = None
        self._error: BaseException | None = None
        self._queue: Queue[tuple[Caught, Sequence[int]] | None] = Queue(_WAITING)
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise UsageError(f"{self.folder}: another process is writing there") from None
        try:
            self._take_up()
        except BaseException:
            self._lock.release()
            raise
        self._thread.start()
        return self

    def _take_up(self) -> None:
        """Begin a folder, or find out how far the last run came."""
        if not (self.folder / INDEX).exists():
            if others := sorted(p.name for p in self.folder.glob("[!.]*") if p.suffix != ".draft"):
                raise UsageError(f"{self.folder}: holds other files ({others[0]}); take another")
            self._write_index({"finished": False})
            return
        index = read_index(self.folder)
        self._finished = index["finished"]
        if not self._finished and not shard_path(self.folder, 0).exists():
            self._write_index({"finished": False})  # no row was made with its settings
            return
        old = {key: json.dumps(value) for key, value in index["settings"].items()}
        check_same(self.folder, old, {k: json.dumps(v) for k, v in self.settings.items()})
        while (path := shard_path(self.folder, len(self.shards))).exists():
            with opened(path) as shard:
                self._note([(number, n) for number, n in json.loads(shard.metadata()["rows"])])

    def add(self, caught: Caught, numbers: Sequence[int]) -> None:
        """Have rows written; `numbers` are those of the utterances in the batch.

        Utterances that are in a shard already are left out. Waits only where the disk falls behind.
        """
        self._raise()
        self._queue.put((caught, numbers))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._queue.put(None)
            self._thread.join()
            if kind is None:
                self._raise()
                self._close_shard()
                if not self._finished:  # its versions are those that made it
                    self._write_index({"finished": True, **self._contents()})
        finally:
            self._lock.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """After an error it goes on taking what comes, so that nobody waits for it in vain."""
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._keep(*item)
                except BaseException as error:  # raised again where `add` is called
                    self._error = error
            del item  # or the batch would lie in memory until the next one comes

    def _keep(self, caught: Caught, numbers: Sequence[int]) -> None:
        counts = torch.bincount(caught.clip, minlength=len(numbers)).tolist()
        caught, stop = caught.cpu(), 0
        n_residuals, _, width = caught.residuals.shape
        room = max(1, self.shard_bytes // (n_residuals * width * caught.residuals.itemsize))
        for number, n in zip(numbers, counts, strict=True):
            rows = slice(stop, stop := stop + n)
            if number in self.done:
                continue
            _check_range(caught, rows, self.utterances[number]["utterance"])
            if self._open and self._open.n + n > room:
                self._close_shard()
            if not self._open or n > self._open.room:  # a clip too large for a shard has its own
                self._open = _Open(caught, max(room, n))
            self._open.put(caught, rows, number)

    def _close_shard(self) -> None:
        if not self._open or not self._open.counts:
            return
        path = shard_path(self.folder, len(self.shards))
        draft = path.with_suffix(".draft")
        try:
            save_file(self._open.tensors(), draft, {"rows": json.dumps(self._open.counts)})
            shutil.copymode(self.folder / INDEX, draft)  # safetensors lets its owner alone read it
            draft.replace(path)
        except (OSError, SafetensorError) as error:  # a full disk, say
            raise UsageError(f"{path}: {error}") from None
        self._note(self._open.counts)
        self._open.clear()

    def _note(self, counts: list[tuple[int, int]]) -> None:
        self.shards.append(counts)
        self.done.update(number for number, _ in counts)

    def size(self) -> dict[str, Any]:
        """Rows, shards and MB (10^6 bytes) that are on disk."""
        paths = [shard_path(self.folder, shard) for shard in range(len(self.shards))]
        return {
            "rows": sum(n for counts in self.shards for _, n in counts),
            "shards": len(paths),
            "mb": round(sum(path.stat().st_size for path in paths) / 1e6, 1),
        }

    def _contents(self) -> dict[str, Any]:
        """What is where: of each utterance its shard, and its rows in the whole capture."""
        found: dict[int, dict[str, Any]] = {}
        first = 0
        for shard, counts in enumerate(self.shards):
            for number, n in counts:
                found[number] = {"shard": shard, "first_row": first, "rows": n}
                first += n
        utterances = [{**u, **found[i]} for i, u in enumerate(self.utterances)]
        return {"rows": first, "shards": len(self.shards), "utterances": utterances}

    def _write_index(self, contents: Mapping[str, Any]) -> None:
        index = {"schema": SCHEMA, "settings": self.settings, **self.about, **contents}
        draft = self.folder / f"{INDEX}.draft"
        draft.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(self.folder / INDEX)


def _check_range(caught: Caught, rows: slice, utterance: str) -> None:
    """UsageError where float16, which ends at 65504, could not hold a number."""
    if caught.residuals.dtype != torch.float16:
        return
    fits = np.isfinite(caught.residuals.numpy()[:, rows]).all((1, 2))
    if not fits.all():
        number = caught.numbers[int(fits.argmin())]
        raise UsageError(f"h_{number} of {utterance} holds numbers beyond float16: take bfloat16")
