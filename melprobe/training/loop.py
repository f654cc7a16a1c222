"""The training loop: accelerate, gradient accumulation, resumable to the batch."""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from melprobe.errors import UsageError
from melprobe.folders import replace_folder
from melprobe.training.muon import Muon
from melprobe.training.processes import (
    Losses,
    Mean,
    Share,
    as_first,
    make_accelerator,
    over_processes,
    own_part,
    spread,
    whole,
)
from melprobe.training.recipe import Optim, Recipe
from melprobe.training.state import State


class Task(Protocol):
    """What is trained: a model with a loss, its batches, its measure and its checkpoint."""

    model: Any
    """A transformers model: it has `get_decoder()` and returns a `loss`."""

    heads: nn.Module
    """What is trained beside the model and needed by no checkpoint."""

    def batches(self, start: int, share: Share) -> Iterable[tuple[int, Any]]:
        """(step, keyword arguments of the model) from batch `start` on, the share of each.

        Where that is empty, something else with the key `idle`.
        """

    def losses(self, model: Any, batch: Any, step: int, mean: Mean) -> dict[str, Tensor]:
        """`train_loss` is what to minimise, the others are for the log; all are made by `mean`.

        `model` is the task's own, made ready for the device.
        """

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures on held-out data, on all of it in every process.

        `dev_loss`, where there is one, decides what is best.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors that a checkpoint holds."""

    def save(self, folder: Path, tensors: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
        """Write a checkpoint that can be used, of whole `tensors`, and the log of its training."""


def learning_rate_scale(step: int, recipe: Recipe) -> float:
    """Of `optim.lr`: linear warm-up, then cosine or linear decay to a hundredth."""
    first, steps, height = recipe.schedule_at(step)
    optim, step = recipe.optim, step - first
    if step < optim.warmup:
        return height * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    decay = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return height * max(decay, 0.01)


def fit(task: Task, recipe: Recipe, device: torch.device | None = None) -> list[dict[str, Any]]:
    """Train `task` as `recipe` says, from its saved state if there is one; returns the log.

    device: a CPU or a GPU; the first GPU there is when not given.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which accelerate then takes
    accelerator = make_accelerator(
        device, bf16=recipe.precision == "bf16", accumulate=recipe.optim.accumulate
    )
    share = Share(accelerator.process_index, accelerator.num_processes)
    first = accelerator.is_main_process  # which alone writes checkpoints and tells
    losses_of = Losses(task, share)
    spread_out = spread(losses_of, accelerator.device, recipe.parallel)
    trainable = trainable_parameters(task)
    optimizers = make_optimizers(trainable, recipe.optim)
    state = State(recipe.out / "state", trainable, optimizers, share)
    if accelerator.device.type == "cpu":
        # The backward pass of the fused attention kernel takes 4x as long on short sequences.
        task.model.set_attn_implementation("eager")
    if recipe.compile:
        for block in task.model.get_decoder().layers:  # one block's code serves them all
            # Not `block.compile`, which would take the hooks that listen there along.
            block.forward = torch.compile(block.forward, dynamic=True)
    # Which wraps it in autocast, for decoding too; gradients are averaged by `spread`.
    accelerator.prepare_model(task.model, evaluation_mode=True)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    writer = SummaryWriter(recipe.out / "tensorboard", purge_step=state.step) if first else None
    clock, saved = time.monotonic() - state.seconds, time.monotonic()
    task.model.train()
    with _progress(shown=first) as progress:
        bar = progress.add_task(recipe.out.name, total=recipe.steps, completed=state.step, note="")
        for step, batch in task.batches(state.step, share):
            scale = learning_rate_scale(step, recipe)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            torch.manual_seed(recipe.seed + step)  # dropout, where the base has any
            made = _update(accelerator, spread_out, optimizers, batch, step, recipe.optim.clip)
            losses = over_processes(made, share)
            _check_finite(losses["train_loss"], recipe, step)
            state.running.append(losses)
            state.step, state.seconds = step + 1, time.monotonic() - clock
            last = state.step == recipe.steps
            if state.step % recipe.log_every == 0 or last:
                means = _means(state.running)
                state.running.clear()
                state.note({**means, "lr_scale": scale}, writer)
                progress.update(bar, note=f"loss {means['train_loss']:.3f}")
                if first and not progress.console.is_terminal:
                    parts = " ".join(f"{name} {value:.3f}" for name, value in means.items())
                    print(f"step {state.step} {parts} {state.seconds:.0f} s", flush=True)
            if state.step % recipe.evaluate_every == 0 or last:
                measured = _evaluate(losses_of, step)
                state.note(measured, writer)
                if first:
                    progress.print(state.log[-1])
                dev_loss = as_first(measured.get("dev_loss", math.inf), share, accelerator.device)
                if dev_loss < state.best:
                    state.best = dev_loss
                    _save(task, recipe.out / "best", state.log, share)
            if state.step in recipe.keep:
                _save(task, recipe.out / f"at-{state.step}", state.log, share)
            at_update = state.step % recipe.optim.accumulate == 0
            if at_update:
                waited = as_first(time.monotonic() - saved, share, accelerator.device)
            if last or (at_update and waited > 60 * recipe.save_minutes):
                for parameter in trainable.values():  # before a loss has come of it
                    _check_finite(own_part(parameter.detach()).sum().item(), recipe, step)
                state.save()
                saved = time.monotonic()
            progress.update(bar, completed=state.step)
    _save(task, recipe.out / "last", state.log, share)
    if writer:
        writer.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state.log


def _update(
    accelerator: Accelerator,
    losses_of: nn.Module,
    optimizers: list[Any],
    batch: Any,
    step: int,
    clip: float,
) -> dict[str, Tensor]:
    on_device = {key: value.to(accelerator.device) for key, value in batch.items()}
    with accelerator.accumulate(losses_of):
        with accelerator.autocast():
            losses = losses_of(on_device, step)
        accelerator.backward(losses["train_loss"])
        if accelerator.sync_gradients:
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _check_finite(value: float, recipe: Recipe, step: int) -> None:
    if not math.isfinite(value):
        raise UsageError(
            f"{recipe.out}: loss or weights are {value} at step {step + 1}; take a lower optim.lr "
            "and another --out"
        )


def _means(losses: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each part over the steps that had it."""
    names = dict.fromkeys(name for step in losses for name in step)
    return {name: fmean(step[name] for step in losses if name in step) for name in names}


def _evaluate(losses_of: Losses, step: int) -> dict[str, float]:
    losses_of.model.eval()
    with torch.compiler.set_stance("force_eager"):  # decoding has shapes of its own
        measured = losses_of.evaluate(step)
    losses_of.model.train()
    return measured


def _save(task: Task, folder: Path, log: list[dict[str, Any]], share: Share) -> None:
    """The task's checkpoint: all processes put its tensors together, the first one writes them."""
    tensors = whole(task.tensors(), share)
    if share.rank == 0:
        replace_folder(folder, lambda draft: task.save(draft, tensors, log))


def trainable_parameters(task: Task) -> dict[str, nn.Parameter]:
    """What the optimiser moves, by name."""
    named = [*task.model.named_parameters(), *task.heads.named_parameters(prefix="heads")]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def make_optimizers(
    trainable: Mapping[str, nn.Parameter], optim: Optim
) -> list[torch.optim.Optimizer]:
    """AdamW, in which front and encoder have their own learning rates, and Muon if asked for."""
    encoder, front, rest, matrices = [], [], [], []
    for name, parameter in trainable.items():
        if name.startswith("audio_front.encoder."):
            encoder.append(parameter)
        elif name.startswith("audio_front."):
            front.append(parameter)
        elif optim.muon and _is_inner_matrix(name, parameter):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": encoder, "lr": optim.encoder_lr},
        {"params": front, "lr": optim.front_lr or optim.lr},
        {"params": rest, "lr": optim.lr},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        decay = optim.weight_decay
        adamw = torch.optim.AdamW(groups, betas=optim.betas, weight_decay=decay, fused=True)
        optimizers.append(adamw)
    if matrices:
        optimizers.append(Muon(matrices, optim.lr, optim.weight_decay))
    return optimizers


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Muon is for matrices between hidden states (Jordan 2024): blocks', not the embeddings."""
    return parameter.dim() == 2 and ".layers." in name


def _progress(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, disable=not shown)
