"""What a study would take: parameters, positions, memory and hours of its recipes, untrained.

Counted on models without weights (torch's meta device). Activations are counted as 34 bytes a
position, layer and unit of width (Korthikanti et al. 2022, arXiv 2205.05198), fused attention and
no recomputation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from melprobe.audio.mel import FRAMES_PER_SECOND
from melprobe.errors import UsageError
from melprobe.model import phi4
from melprobe.model.adapter import add_lora
from melprobe.model.base import resolve_base
from melprobe.model.config import ENCODERS, MelLLMConfig
from melprobe.model.encoder import encoder_config, resolve_encoder
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.studies.running import Run
from melprobe.studies.sizes import Size
from melprobe.training.flop import training_flop
from melprobe.training.recipe import Model, SpeechRecipe

TOKENS_PER_SECOND = 3.5  # of answers, English read aloud


class Budget(NamedTuple):
    """Of one training run."""

    parameters: int
    learning: int
    positions: float
    memory: float
    """bytes on one device"""
    flop: float


def budget(runs: Sequence[Run], size: Size) -> str:
    """A table, one line an arm, and the sum over all runs that are not shared."""
    table = Table("arm", *("parameters M", "learning M", "positions M", "memory GB", "hours"))
    distinct = {run.folder: run for run in reversed(runs)}  # the first of those that share one
    hours, too_large = 0.0, []
    for run in reversed(distinct.values()):
        found = count(run.recipe, size.devices)
        of_run = found.flop / (size.devices * size.tflops * 1e12 * size.utilisation) / 3600
        hours += of_run
        if run.seed == 0:
            numbers = (found.parameters / 1e6, found.learning / 1e6, found.positions / 1e6)
            cells = [f"{number:,.1f}" for number in (*numbers, found.memory / 1e9)]
            too_large += [run.arm.label] * (found.memory > 1e9 * size.memory_gb)
            table.add_row(run.arm.label, *cells, f"{of_run:,.2f}")
    console = Console(width=110)
    with console.capture() as captured:
        console.print(table)
    warning = ""
    if too_large:
        warning = (
            f"\nmore than the {size.memory_gb:g} GB of a device: {', '.join(too_large)}; take a "
            "smaller data.batch_seconds and a larger optim.accumulate"
        )
    return (
        f"{captured.get()}{len(distinct)} training runs, {hours:,.1f} hours on {size.hardware} "
        f"({hours * size.devices:,.1f} device hours), at {size.utilisation:.0%} of "
        f"{size.tflops:g} TFLOP/s{warning}"
    )


def count(recipe: SpeechRecipe, devices: int) -> Budget:
    """UsageError for a recipe that no model can be made of."""
    model = _empty_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config
    rate = FRAMES_PER_SECOND / config.frames_per_patch + TOKENS_PER_SECOND
    batch = max(stage.batch_seconds or recipe.data.batch_seconds for stage in recipe.data.stages)
    seconds = sum(
        stage.steps * (stage.batch_seconds or recipe.data.batch_seconds)
        for stage in recipe.data.stages
    )
    text = config.text_config
    activations = 34 * batch * rate * text.num_hidden_layers * text.hidden_size
    # Frozen weights in bfloat16; those that learn with gradient and two moments in float32.
    memory = 2 * (parameters - learning) + 16 * learning + activations
    seconds *= devices
    counts = {
        "positions": seconds * rate,
        "patches": seconds * FRAMES_PER_SECOND / config.frames_per_patch,
        "answers": seconds * TOKENS_PER_SECOND,
        "frames": seconds * FRAMES_PER_SECOND,
    }
    flop = training_flop(model, counts)
    return Budget(parameters, learning, counts["positions"], memory, flop)


def check_layers(size: Size) -> None:
    """UsageError unless its base has as many blocks as it says: arms name blocks by number."""
    model = size.with_changes(size.bare, Path("bare"), 0).model
    if (n := _text_config(model).num_hidden_layers) != size.n_layers:
        raise UsageError(f"n_layers: {size.n_layers}, but {model.base} has {n} blocks")


def _empty_model(recipe: SpeechRecipe) -> MelLLMForConditionalGeneration:
    """The recipe's model without weights; what learns requires a gradient."""
    settings = recipe.model
    text, encoder = _configs(settings)
    config = MelLLMConfig(
        text_config=text,
        audio_front=settings.front,
        frames_per_patch=settings.frames_per_patch,
        conv_channels=settings.conv_channels,
        encoder_config=encoder,
        audio_token_id=0,
    )
    with torch.device("meta"):
        model = MelLLMForConditionalGeneration(config)
        if settings.lora:
            add_lora(model, settings.lora.to_peft())
    if encoder is not None and not settings.encoder.train:
        model.audio_front.encoder.requires_grad_(False)
    return model


def _configs(settings: Model) -> tuple[Any, Any]:
    """Of decoder and encoder; those of Phi-4-multimodal itself are known without the hub."""
    encoder = None
    if settings.front in ENCODERS:
        if settings.encoder.name == phi4.HUB_ID:
            encoder = phi4.published_audio_config(settings.encoder.conformer)
        else:
            folder = resolve_encoder(settings.encoder.name)
            encoder = encoder_config(folder, settings.front, settings.encoder.conformer)
    return _text_config(settings), encoder


def _text_config(settings: Model) -> Any:
    if settings.base == phi4.HUB_ID:
        return phi4.published_text_config()
    return AutoConfig.from_pretrained(resolve_base(settings.base))
