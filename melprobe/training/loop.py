"""The training loop: accelerate, gradient accumulation, resumable to the batch. One process."""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from melprobe.errors import UsageError
from melprobe.training.recipe import Optim, Recipe
from melprobe.training.state import State, replace_folder


class Task(Protocol):
    """What is trained: a model with a loss, its batches, its measure and its checkpoint."""

    model: Any
    """A transformers model: it has `get_decoder()` and returns a `loss`."""

    def batches(self, start: int) -> Iterable[tuple[int, Any]]:
        """(step, keyword arguments of the model) from batch `start` on."""

    def loss(self, model: Any, batch: Any, step: int) -> Tensor:
        """What to minimise; `model` is the task's own, made ready for the device."""

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
    if accelerator.num_processes > 1:
        raise UsageError("training runs in one process; start it with python, not with torchrun")
    state = State(recipe.out / "state", task.model, optimizer)
    if accelerator.device.type == "cpu":
        # The backward pass of the fused attention kernel takes 4x as long on short sequences.
        task.model.set_attn_implementation("eager")
    if recipe.compile:
        for block in task.model.get_decoder().layers:  # one block's code serves them all
            if not block._forward_pre_hooks:  # hooks run outside of compiled code
                block.compile(dynamic=True)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    writer = SummaryWriter(recipe.out / "tensorboard", purge_step=state.step)
    clock, saved = time.monotonic() - state.seconds, time.monotonic()
    model.train()
    with _progress() as progress:
        bar = progress.add_task(recipe.out.name, total=recipe.steps, completed=state.step, note="")
        for step, batch in task.batches(state.step):
            scale = learning_rate_scale(step, recipe.steps, recipe.optim)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * scale
            torch.manual_seed(recipe.seed + step)  # dropout, where the base has any
            state.running.append(
                _update(accelerator, task, model, optimizer, batch, step, recipe.optim.clip)
            )
            state.step, state.seconds = step + 1, time.monotonic() - clock
            last = state.step == recipe.steps
            if state.step % recipe.log_every == 0 or last:
                loss = sum(state.running) / len(state.running)
                state.running.clear()
                if not math.isfinite(loss):
                    raise UsageError(
                        f"{recipe.out}: the loss is {loss} at step {state.step}; lower optim.lr "
                        "and train again (the last state is from before)"
                    )
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
                    replace_folder(recipe.out / "best", lambda best: task.save(best, state.log))
            at_update = state.step % recipe.optim.accumulate == 0
            if last or (at_update and time.monotonic() - saved > 60 * recipe.save_minutes):
                state.save()
                saved = time.monotonic()
            progress.update(bar, completed=state.step)
    replace_folder(recipe.out / "last", lambda folder: task.save(folder, state.log))
    writer.close()
    return state.log


def _update(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    step: int,
    clip: float,
) -> float:
    on_device = {key: value.to(accelerator.device) for key, value in batch.items()}
    with accelerator.accumulate(model):
        with accelerator.autocast():
            loss = task.loss(model, on_device, step)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


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


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
