"""The training loop: accelerate, gradient accumulation, resumable to the batch.

The state to resume from is safetensors and JSON, written beside the old one and then swapped in,
so a run killed at any moment finds a whole one.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from melprobe.training.recipe import Optim, Recipe


class Task(Protocol):
    """What is trained: a model with a loss, its batches, its measure and its checkpoint."""

    model: Any
    """A transformers model: it has `get_decoder()` and returns a `loss`."""

    def batches(self, start: int) -> Iterable[tuple[int, Any]]:
        """(step, keyword arguments of the model) from batch `start` on."""

    def evaluate(self) -> dict[str, float]:
        """Measures on held-out data; `dev_loss` decides which checkpoint is best."""

    def save(self, folder: Path, log: list[dict[str, Any]]) -> None:
        """Write a checkpoint that can be used, and the log of its training."""


def learning_rate_scale(step: int, steps: int, optim: Optim) -> float:
    """Linear warm-up, then cosine or linear decay to a hundredth."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    decay = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return max(decay, 0.01)


def fit(task: Task, recipe: Recipe) -> list[dict[str, Any]]:
    """Train `task` as `recipe` says, from its saved state if there is one; returns the log."""
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.optim.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    task.model.to(accelerator.device)
    optimizer = make_optimizer(task.model, recipe.optim, fused=accelerator.device.type == "cuda")
    state = _State(recipe.out / "state", task.model, optimizer)
    if accelerator.device.type == "cpu":
        # The backward pass of the fused attention kernel takes 4x as long on short sequences.
        task.model.set_attn_implementation("eager")
    if recipe.compile:
        for block in task.model.get_decoder().layers:  # one block's code serves them all
            block.compile(dynamic=True)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    writer = SummaryWriter(recipe.out / "tensorboard", purge_step=state.step)
    clock, saved = time.monotonic() - state.seconds, time.monotonic()
    running: list[Tensor] = []
    with _progress() as progress:
        bar = progress.add_task(recipe.out.name, total=recipe.steps, completed=state.step, note="")
        for step, batch in task.batches(state.step):
            scale = learning_rate_scale(step, recipe.steps, recipe.optim)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * scale
            running.append(_update(accelerator, model, optimizer, batch, recipe.optim.clip))
            state.step, state.seconds = step + 1, time.monotonic() - clock
            last = state.step == recipe.steps
            if state.step % recipe.log_every == 0 or last:
                loss = torch.stack(running).mean().item()
                running.clear()
                state.note({"train_loss": loss, "lr_scale": scale}, writer)
                progress.update(bar, note=f"loss {loss:.3f}")
                if not progress.console.is_terminal:
                    print(f"step {state.step} loss {loss:.3f} {state.seconds:.0f} s", flush=True)
            if state.step % recipe.evaluate_every == 0 or last:
                measured = _evaluate(task)
                state.note(measured, writer)
                progress.print(state.log[-1])
                if measured["dev_loss"] < state.best:
                    state.best = measured["dev_loss"]
                    task.save(recipe.out / "best", state.log)
            at_update = state.step % recipe.optim.accumulate == 0
            if last or (at_update and time.monotonic() - saved > 60 * recipe.save_minutes):
                state.save()
                saved = time.monotonic()
            progress.update(bar, completed=state.step)
    task.save(recipe.out / "last", state.log)
    writer.close()
    return state.log


def _update(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batch: Any, clip: float
) -> Tensor:
    with accelerator.accumulate(model):
        loss = model(**{key: value.to(accelerator.device) for key, value in batch.items()}).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _evaluate(task: Task) -> dict[str, float]:
    task.model.eval()
    with torch.compiler.set_stance("force_eager"):  # decoding has shapes of its own
        measured = task.evaluate()
    task.model.train()
    return measured


def make_optimizer(model: nn.Module, optim: Optim, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; the audio front may have its own learning rate."""
    front = {id(p) for name, p in model.named_parameters() if name.startswith("audio_front.")}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in front], "lr": optim.front_lr or optim.lr},
        {"params": [p for p in trainable if id(p) not in front], "lr": optim.lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


class _State:
    """Step, clock, best score, log, trainable weights and optimiser moments, on disk and back."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.folder = folder
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.step, self.seconds, self.best = 0, 0.0, float("inf")
        self.log: list[dict[str, Any]] = []
        old = folder.with_suffix(".old")
        if not folder.exists() and old.exists():  # killed between the two renames
            old.rename(folder)
        if folder.exists():
            self._load()

    def note(self, measured: dict[str, float], writer: SummaryWriter) -> None:
        """Add a line to the log: what was measured, at which step and second of training."""
        self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **measured})
        for name, value in measured.items():
            writer.add_scalar(name, value, self.step)

    def save(self) -> None:
        draft, old = self.folder.with_suffix(".draft"), self.folder.with_suffix(".old")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(self._tensors(), draft / "state.safetensors")
        fields = {"step": self.step, "seconds": self.seconds, "best": self.best, "log": self.log}
        (draft / "state.json").write_text(json.dumps(fields))
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        draft.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors[name] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}@{key}"] = value
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def _load(self) -> None:
        fields = json.loads((self.folder / "state.json").read_text())
        self.step, self.seconds = fields["step"], fields["seconds"]
        self.best, self.log = fields["best"], fields["log"]
        fused = self.optimizer.defaults["fused"]
        for name, tensor in load_file(self.folder / "state.safetensors").items():
            parameter_name, _, key = name.partition("@")
            parameter = self.named[parameter_name]
            if key:
                # The step count lives on the CPU, unless the fused kernel reads it on the GPU.
                on_cpu = key == "step" and not fused
                self.optimizer.state[parameter][key] = (
                    tensor if on_cpu else tensor.to(parameter.device)
                )
            else:
                parameter.copy_(tensor)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
