"""What a training run leaves on disk: never half of anything, never pickled.

A folder is written beside the old one and then put in its place, so that a run which is killed at
any moment finds a whole one when it starts again.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from melprobe.errors import UsageError


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, then put it in the old one's place."""
    draft, old = folder.with_suffix(".draft"), folder.with_suffix(".old")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> bool:
    """Whether the folder is there; one whose replacement was cut off is put back."""
    old = folder.with_suffix(".old")
    if not folder.exists() and old.exists():  # killed between the two renames
        old.rename(folder)
    return folder.exists()


class State:
    """Step, clock, best score, log, trainable weights and optimiser moments, on disk and back."""

    def __init__(
        self,
        folder: Path,
        trainable: Mapping[str, nn.Parameter],
        optimizers: list[torch.optim.Optimizer],
    ):
        self.folder = folder
        self.named = trainable
        self.optimizers = optimizers
        self.step, self.seconds, self.best = 0, 0.0, float("inf")
        self.running: list[dict[str, float]] = []
        """Losses and their parts since the last line of the log."""
        self.log: list[dict[str, Any]] = []
        if recover_folder(folder):
            try:
                self._load()
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise UsageError(
                    f"{folder}: damaged ({type(error).__name__}: {error}); delete it to begin again"
                ) from None

    def note(self, measured: dict[str, float], writer: SummaryWriter) -> None:
        """Add a line to the log: what was measured, at which step and second of training."""
        self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **measured})
        for name, value in measured.items():
            writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        replace_folder(self.folder, self._write)

    def _write(self, folder: Path) -> None:
        save_file(self._tensors(), folder / "state.safetensors")
        names = ("step", "seconds", "best", "running", "log")
        fields = {name: getattr(self, name) for name in names}
        (folder / "state.json").write_text(json.dumps(fields))

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[name] = parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}@{key}"] = value
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

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
        for name, tensor in load_file(self.folder / "state.safetensors").items():
            parameter_name, _, key = name.partition("@")
            parameter = self.named[parameter_name]
            if key:
                owner[parameter].state[parameter][key] = tensor.to(parameter.device)
            else:
                parameter.copy_(tensor)
