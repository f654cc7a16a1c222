"""Whisper weights out of a CTranslate2 `model.bin`, without CTranslate2.

The file is a header (format version, spec name and revision) and plain records: name, shape,
dtype, bytes; then aliases. Only unquantised models are read. What the file does not hold (the
tokenizer, generation settings) is the caller's to find.
"""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig

from melprobe.errors import UsageError

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by the file's dtype number
_PROJECTIONS = {  # how linear_0, linear_1, ... are fused; cross-attention queries something else
    "self_attention": (("q_proj", "k_proj", "v_proj"), ("out_proj",)),
    "attention": (("q_proj",), ("k_proj", "v_proj"), ("out_proj",)),
}
_RENAMES = (  # first match wins
    (r"layer_(\d+)/self_attention/layer_norm", r"layers/\1/self_attn_layer_norm"),
    (r"layer_(\d+)/attention/layer_norm", r"layers/\1/encoder_attn_layer_norm"),
    (r"layer_(\d+)/ffn/layer_norm", r"layers/\1/final_layer_norm"),
    (r"layer_(\d+)/ffn/linear_0", r"layers/\1/fc1"),
    (r"layer_(\d+)/ffn/linear_1", r"layers/\1/fc2"),
    (r"position_encodings/encodings", "embed_positions/weight"),
    (r"embeddings/weight", "embed_tokens/weight"),
)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every record of a `model.bin` by its name, scalars included; an alias is the same array."""
    with path.open("rb") as file:
        _integer(file, 4)  # format version
        spec = _string(file)
        if spec != "WhisperSpec":
            raise UsageError(f"{path}: a CTranslate2 {spec or 'unnamed'} model, expected Whisper")
        _integer(file, 4)  # spec revision
        tensors = {}
        for _ in range(_integer(file, 4)):
            name = _string(file)
            shape = [_integer(file, 4) for _ in range(_integer(file, 1))]
            dtype = _DTYPES[_integer(file, 1)]
            tensors[name] = np.frombuffer(file.read(_integer(file, 4)), dtype).reshape(shape)
        for _ in range(_integer(file, 4)):
            alias, name = _string(file), _string(file)
            tensors[alias] = tensors[name]
    return tensors


def whisper_config(tensors: dict[str, np.ndarray]) -> WhisperConfig:
    """The architecture, as far as shapes and scalars tell it; they don't tell the token ids."""
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    feed_forward = len(tensors["encoder/layer_0/ffn/linear_0/bias"])
    heads = int(tensors["encoder/num_heads"])
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        encoder_layers=_count_layers(tensors, "encoder"),
        decoder_layers=_count_layers(tensors, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
    )


def whisper_weights(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict for `WhisperForConditionalGeneration`, float32, to be loaded strictly."""
    weights: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or name.endswith(("alignment_heads", "alignment_layer")):
            continue  # settings, not weights
        if name == "decoder/projection/weight":
            weights["proj_out.weight"] = tensor
        elif found := re.fullmatch(r"(.+)/layer_(\d+)/(\w*attention)/linear_(\d)/(\w+)", name):
            stack, layer, kind, linear, part = found.groups()
            projections = _PROJECTIONS[kind][int(linear)]
            attention = "self_attn" if kind == "self_attention" else "encoder_attn"
            for key, piece in zip(projections, np.split(tensor, len(projections)), strict=True):
                if (key, part) == ("k_proj", "bias"):  # Whisper's keys have none: stored as zeros
                    if piece.any():
                        raise UsageError(f"{name}: keys with a bias, so not a Whisper model")
                    continue
                weights[f"model.{stack}.layers.{layer}.{attention}.{key}.{part}"] = piece
        else:
            weights[f"model.{_renamed(name)}"] = tensor
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items()}


def _renamed(name: str) -> str:
    for pattern, target in _RENAMES:
        name, done = re.subn(pattern, target, name)
        if done:
            break
    return name.replace("gamma", "weight").replace("beta", "bias").replace("/", ".")


def _count_layers(tensors: dict[str, np.ndarray], stack: str) -> int:
    found = (re.match(rf"{stack}/layer_(\d+)/", name) for name in tensors)
    return len({match[1] for match in found if match})


def _integer(file: BinaryIO, size: int) -> int:
    return int.from_bytes(file.read(size), "little")


def _string(file: BinaryIO) -> str:
    return file.read(_integer(file, 2)).rstrip(b"\0").decode()
