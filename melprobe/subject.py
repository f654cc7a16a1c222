"""Whose layers a study takes apart: a checkpoint of ours, or someone else's model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from melprobe.analysis.findings import checkpoint_name, describe_checkpoint, describe_other
from melprobe.errors import UsageError
from melprobe.hooks.anatomy import only_reads
from melprobe.listener import DTYPES, Listener, fast_dtype, load, load_model, pick_device
from melprobe.model.base import place_of
from melprobe.model.checkpoint import (
    DEFAULT,
    find_checkpoint,
    lora_blocks,
    read_config,
    weights_file,
)
from melprobe.model.exit import check_reached
from melprobe.model.others import read_other_config, weights_gb, weights_hash
from melprobe.wheels import file_sha256


class Subject(NamedTuple):
    """What can be known before any weight is loaded, and how to load it."""

    name: str
    n_layers: int
    n_heads: int
    """of a block's attention"""
    with_lora: list[int]
    """blocks that an adapter changed"""
    fingerprint: Callable[[], str]
    """of the weights"""
    load: Callable[[Any, bool], Listener]
    """from a command's options, and whether LoRA is folded in"""
    describe: Callable[[Listener], dict[str, Any]]
    """for results.json"""
    folder: Path | None = None
    """of a checkpoint of ours"""


def find_subject(options: Any) -> Subject:
    """As a command's options `--checkpoint` or `--model` name it; UsageError if it isn't there."""
    if options.model is None:
        if options.device_map:
            raise UsageError("--device-map goes with --model")
        return _checkpoint(find_checkpoint(options.checkpoint or DEFAULT))
    if options.checkpoint is not None:
        raise UsageError("--model and --checkpoint: name one of them")
    if options.device_map and options.device:
        raise UsageError("--device-map and --device: name one of them")
    return _other(options.model, options.copy_text)


def _checkpoint(folder: Path) -> Subject:
    config = read_config(folder)
    n_layers = config.text_config.num_hidden_layers
    check_reached(config, range(n_layers))  # any cut is compared with what all blocks did

    def read(options: Any, merge: bool) -> Listener:
        dtype = DTYPES.get(options.dtype)
        return load(folder, device=options.device, dtype=dtype, merge=merge)

    return Subject(
        checkpoint_name(folder),
        n_layers,
        config.text_config.num_attention_heads,
        lora_blocks(folder, n_layers),
        lambda: file_sha256(weights_file(folder)),
        read,
        lambda listener: describe_checkpoint(folder, listener),
        folder,
    )


def _other(name: str, copy_text: bool) -> Subject:
    name = place_of(name)
    config = read_other_config(name)
    if only_reads(config) and not copy_text:
        raise UsageError(
            f"--model {name}: {config.model_type} hears nothing; --copy-text studies it on text"
        )
    text = config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        raise UsageError(f"--model {name}: {config.model_type} has no attention in its blocks")

    def read(options: Any, merge: bool) -> Listener:
        dtype = DTYPES.get(options.dtype) or fast_dtype(pick_device(options.device))
        print(needed_memory(name, dtype), file=sys.stderr)
        return load_model(name, device=options.device, dtype=dtype, device_map=options.device_map)

    return Subject(
        name.rstrip("/").rpartition("/")[2],
        text.num_hidden_layers,
        text.num_attention_heads,
        [],
        lambda: weights_hash(name),
        read,
        lambda listener: describe_other(name, weights_hash(name), listener),
    )


def needed_memory(name: str, dtype: torch.dtype) -> str:
    """What someone else's model will take, in a line for its user."""
    billions, gigabytes = weights_gb(name, dtype)
    kind = str(dtype).removeprefix("torch.")
    return f"{name}: {billions:.3g} billion parameters, {gigabytes:.3g} GB in {kind} to be loaded"
