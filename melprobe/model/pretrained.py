"""Adapter checkpoints by the keywords of transformers' `from_pretrained`: what it can honour."""

from pathlib import Path
from typing import Any

import torch

from melprobe.errors import UsageError
from melprobe.model.checkpoint import load_model, read_config
from melprobe.model.config import MelLLMConfig
from melprobe.model.modelling import MelLLMForConditionalGeneration

# What transformers passes on to its hub client and to weight formats that an adapter doesn't have.
_OF_NO_CONCERN = {
    *("_commit_hash", "_from_auto", "adapter_kwargs", "cache_dir", "code_revision"),
    *("force_download", "local_files_only", "low_cpu_mem_usage", "proxies", "revision"),
    *("subfolder", "token", "trust_remote_code", "use_safetensors", "weights_only"),
}


def load_pretrained(
    folder: Path,
    *,
    config: Any = None,
    dtype: torch.dtype | str = torch.float32,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = "cpu",
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    merge: bool = False,
    **others: Any,
) -> MelLLMForConditionalGeneration:
    """An adapter checkpoint by the keywords of transformers' `from_pretrained`.

    dtype: float32 when not given or "auto". device_map: a device, or "auto" for the first GPU, else
    the CPU. What concerns the hub alone is ignored, another keyword is a TypeError.
    """
    if unknown := others.keys() - _OF_NO_CONCERN:
        raise TypeError(f"adapter checkpoints don't take {', '.join(sorted(unknown))}")
    if quantization_config is not None:
        raise UsageError(
            f"{folder}: LoRA was trained on this base unquantised; take no quantization_config"
        )
    if isinstance(device_map, dict):
        raise UsageError(f"{folder}: device_map must be one device or 'auto', not a dict")
    if not isinstance(config, MelLLMConfig):
        config = read_config(folder)
    if attn_implementation:
        config._attn_implementation = attn_implementation
    dtype = torch_dtype or dtype
    if isinstance(dtype, str):
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, merge=merge, dtype=dtype, config=config)
    return model.to(device_map or "cpu")
