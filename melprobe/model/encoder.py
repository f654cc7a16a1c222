"""Where a twin's speech encoder comes from: a Whisper or a Phi-4-multimodal, trained or anew."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    Phi4MultimodalAudioConfig,
    PreTrainedConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from melprobe.errors import UsageError
from melprobe.model import phi4
from melprobe.model.base import base_sha256, find_model, read_json
from melprobe.model.config import AudioFront
from melprobe.model.processor import MelLLMFeatureExtractor
from melprobe.model.whisper import ENCODER, JUDGE, packaged_whisper


class EncoderStart(NamedTuple):
    """What a twin's encoder is before its training."""

    name: str
    """A Whisper: `whisper-tiny.en`, a folder, or a hub id; or a Phi-4-multimodal."""
    pretrained: bool = True
    """Its weights; else only its shape, drawn anew."""
    trained: bool = False
    """Whether training changes it."""
    conformer: bool = True
    """Whether Phi-4's has its Conformer blocks; else only the subsampler is left of it."""

    @property
    def stays(self) -> bool:
        """Whether it hears as it was trained, so that checkpoints leave it where it is."""
        return self.pretrained and not self.trained


def resolve_encoder(name: str) -> Path:
    """The local folder of a whole model: packaged, the user's, or fetched from the hub."""
    if name == JUDGE:
        raise UsageError(f"encoder {name!r}: it is the judge, and must not raise what it judges")
    if name == ENCODER:
        return packaged_whisper(ENCODER)
    if folder := find_model(name):
        return folder
    raise UsageError(
        f"no encoder {name!r}: take {ENCODER}, the folder of a Whisper or a Phi-4-multimodal, or a "
        "hub id like owner/name"
    )


def encoder_config(folder: Path, front: AudioFront, conformer: bool = True) -> PreTrainedConfig:
    """Of the encoder for a `front` in a model's folder; UsageError for another model's."""
    kind = read_json(folder / "config.json").get("model_type")
    if front == "phi4":
        if not phi4.is_phi4(folder):
            raise UsageError(f"encoder {folder}: this is a {kind} model, not a Phi-4-multimodal")
        config = phi4.audio_config(folder)
        if not conformer:
            config.num_blocks = 0
        return config
    if kind != "whisper":
        raise UsageError(f"encoder {folder}: this is a {kind} model, not a Whisper")
    config = WhisperConfig.from_pretrained(folder)
    config.name_or_path = ""  # a path of this machine
    return config


def encoder_ears(folder: Path, front: AudioFront) -> MelLLMFeatureExtractor:
    """What makes the spectrogram that the encoder in a model's folder was trained on."""
    config = encoder_config(folder, front)
    if isinstance(config, Phi4MultimodalAudioConfig):
        mean, std = phi4.mel_statistics(folder)
        return MelLLMFeatureExtractor(config.input_size, normalisation="global", mean=mean, std=std)
    return MelLLMFeatureExtractor(
        config.num_mel_bins, f_max=8000.0, normalisation="none", spectrogram="whisper"
    )


def load_encoder(folder: Path, config: PreTrainedConfig) -> nn.Module:
    """The encoder of `config` in float32; UsageError when a tensor is missing or damaged."""
    if isinstance(config, Phi4MultimodalAudioConfig):
        return phi4.load_audio_encoder(folder, config)
    return _load_whisper(folder, config)


def _load_whisper(folder: Path, config: PreTrainedConfig) -> WhisperEncoder:
    try:
        model, found = WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UsageError(f"encoder {folder}: {' '.join(str(error).split())}") from None
    if missing := sorted(name for name in found["missing_keys"] if ".encoder." in name):
        raise UsageError(f"encoder {folder}: {len(missing)} tensors are missing: {missing[0]} …")
    # Anew, because loading takes its sinusoids for weights and makes another config object.
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(model.get_encoder().state_dict())
    return encoder


def frozen_encoder(name: str, sha256: str, config: PreTrainedConfig, where: str) -> nn.Module:
    """The encoder that a checkpoint was trained behind; UsageError when its weights are others."""
    folder = resolve_encoder(name)
    if (found := base_sha256(folder)) != sha256:
        raise UsageError(
            f"{where}: trained behind the encoder of a {name} whose weights hash to {sha256[:12]}, "
            f"but {folder} hashes to {found[:12]}; restore that one"
        )
    return load_encoder(folder, config)
