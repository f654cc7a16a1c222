"""What a training run leaves on disk: never half of anything, never pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from melprobe.errors import UsageError
from melprobe.folders import recover_folder, replace_folder


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

    def note(self, measured: dict[str, float], writer: SummaryWriter | None) -> None:
        """Add a line to the log: what was measured, at which step and second of training."""
        self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **measured})
        if writer:
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
