"""What a training run leaves on disk: never half of anything, never pickled.

Each process writes the part that it has, as safetensors with the rows' places (torch's distributed
checkpoints), so that a run may go on with any number of processes, whether these hold the whole
model or parts of it. Not taken: torch's default writer, whose index is pickled, and one file by the
first process, which would have to hold what none of them can.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.tensorboard import SummaryWriter

from melprobe.errors import UsageError
from melprobe.folders import draft_of, recover_folder, replace_folder
from melprobe.training.processes import WHOLE, Share


class State:
    """Step, clock, best score, log, trainable weights and optimiser moments, on disk and back.

    All processes make, load and save it together. UsageError when what is in `folder` is damaged.
    """

    def __init__(
        self,
        folder: Path,
        trainable: Mapping[str, nn.Parameter],
        optimizers: list[torch.optim.Optimizer],
        share: Share = WHOLE,
    ):
        self.folder = folder
        self.named = trainable
        self.optimizers = optimizers
        self.share = share
        self.step, self.seconds, self.best = 0, 0.0, float("inf")
        self.running: list[dict[str, float]] = []
        """Losses and their parts since the last line of the log."""
        self.log: list[dict[str, Any]] = []
        if share.rank == 0:
            recover_folder(folder)
        self._meet()
        if folder.exists():
            try:
                self._load()
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise UsageError(
                    f"{folder}: damaged ({type(error).__name__}: {error}); delete it to begin again"
                ) from None

    def note(self, measured: dict[str, float], writer: SummaryWriter | None) -> None:
        """Add a line to the log: what was measured, at which step and second of training."""
        self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **measured})
        if writer:
            for name, value in measured.items():
                writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Put it in the place of what is on disk."""
        if self.share.rank == 0:
            replace_folder(self.folder, self._write)
        else:
            self._write(draft_of(self.folder))

    def _write(self, folder: Path) -> None:
        self._meet()  # the first process has made the folder
        with _in_any_number():  # all have written their part when it returns
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            checkpoint.save(self._tensors(), storage_writer=writer)
        if self.share.rank == 0:
            names = ("step", "seconds", "best", "running", "log")
            fields = {name: getattr(self, name) for name in names}
            (folder / "state.json").write_text(json.dumps(fields))

    def _meet(self) -> None:
        if self.share.processes > 1:
            distributed.barrier()

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name, parameter in self.named.items():
            tensors[name] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}@{key}"] = value
        return tensors

    @torch.no_grad()
    def _load(self) -> None:
        for name, value in json.loads((self.folder / "state.json").read_text()).items():
            setattr(self, name, value)
        owner = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        reader = HuggingFaceStorageReader(str(self.folder))
        tensors: dict[str, Any] = {}
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            _check_whole(name, saved)
            parameter_name, _, key = name.partition("@")
            parameter = self.named[parameter_name]
            if not key:
                tensors[name] = parameter.detach()
                continue
            dtype = saved.properties.dtype
            if saved.size == parameter.shape:  # in parts where the parameter is
                tensors[name] = torch.empty_like(parameter, dtype=dtype)
            else:
                tensors[name] = torch.empty(saved.size, dtype=dtype, device=parameter.device)
            owner[parameter].state[parameter][key] = tensors[name]
        with _in_any_number():
            checkpoint.load(tensors, storage_reader=reader)


def _check_whole(name: str, saved: TensorStorageMetadata) -> None:
    """torch would leave rows as they are whose file is lost."""
    rows = sum(part.sizes.numel() for part in saved.chunks)
    if rows != saved.size.numel():
        raise ValueError(f"{name}: parts of it are missing")


@contextmanager
def _in_any_number() -> Iterator[None]:
    """Without the warning that a single process is one, and with an error that is an Exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from error
