"""The CTranslate2 reader against transformers' own Whisper, and packaged ones on real speech."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from melprobe.analysis.wer import corpus_wer, count_errors
from melprobe.audio.load import load_utterance
from melprobe.cache import cache_dir
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.errors import UsageError
from melprobe.model.ctranslate2 import read_tensors, whisper_config, whisper_weights
from melprobe.model.whisper import ENCODER, JUDGE, load_whisper, transcribe

SIZES = {"vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}


def fused(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's weights under CTranslate2's names: written here a second time, layer by layer."""
    out: dict[str, torch.Tensor] = {}

    def put(name: str, module: torch.nn.Module, norm: bool = False) -> None:
        out[f"{name}/{'gamma' if norm else 'weight'}"] = module.weight
        out[f"{name}/{'beta' if norm else 'bias'}"] = module.bias

    def fuse(name: str, *linears: torch.nn.Linear) -> None:
        zeros = torch.zeros(len(linears[0].weight))
        out[f"{name}/weight"] = torch.cat([linear.weight for linear in linears])
        out[f"{name}/bias"] = torch.cat(
            [zeros if linear.bias is None else linear.bias for linear in linears]
        )

    for stack in ("encoder", "decoder"):
        part = getattr(model.model, stack)
        put(f"{stack}/layer_norm", part.layer_norm, norm=True)
        out[f"{stack}/position_encodings/encodings"] = part.embed_positions.weight
        out[f"{stack}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        for i, layer in enumerate(part.layers):
            at = f"{stack}/layer_{i}"
            own = layer.self_attn
            put(f"{at}/self_attention/layer_norm", layer.self_attn_layer_norm, norm=True)
            fuse(f"{at}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            fuse(f"{at}/self_attention/linear_1", own.out_proj)
            put(f"{at}/ffn/layer_norm", layer.final_layer_norm, norm=True)
            put(f"{at}/ffn/linear_0", layer.fc1)
            put(f"{at}/ffn/linear_1", layer.fc2)
            if stack == "decoder":
                cross = layer.encoder_attn
                put(f"{at}/attention/layer_norm", layer.encoder_attn_layer_norm, norm=True)
                fuse(f"{at}/attention/linear_0", cross.q_proj)
                fuse(f"{at}/attention/linear_1", cross.k_proj, cross.v_proj)
                fuse(f"{at}/attention/linear_2", cross.out_proj)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    out["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    return out


def write(path: Path, tensors: dict[str, torch.Tensor], spec: str = "WhisperSpec") -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", 6) + string(spec) + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        number = {"float32": 0, "int16": 2}[array.dtype.name]
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", number, array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + string("decoder/projection/weight")
    path.write_bytes(data + string("decoder/embeddings/weight"))


def test_a_whisper_written_by_hand_is_read_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **TOKENS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write(tmp_path / "model.bin", fused(model))
    tensors = read_tensors(tmp_path / "model.bin")
    config = whisper_config(tensors)
    config.update(TOKENS)
    twin = WhisperForConditionalGeneration(config).eval()
    twin.load_state_dict(whisper_weights(tensors), strict=True)
    heard = {
        "input_features": torch.randn(1, 80, 3000),
        "decoder_input_ids": torch.tensor([[2, 5]]),
    }
    assert torch.equal(model(**heard).logits, twin(**heard).logits)


def test_another_kind_of_model_is_refused(tmp_path):
    write(tmp_path / "model.bin", {}, spec="TransformerSpec")
    with pytest.raises(UsageError, match="CTranslate2 TransformerSpec model, expected Whisper"):
        read_tensors(tmp_path / "model.bin")


@pytest.mark.parametrize(("name", "place"), [(JUDGE, "judges"), (ENCODER, "base")])
def test_a_packaged_whisper_transcribes_the_built_in_speech(name, place):
    if not (cache_dir(place) / name).is_dir():
        pytest.skip(f"{name} is not in the cache")
    clips = read_manifest(find_manifest("builtin/test"))[:4]
    model, processor = load_whisper(name)
    texts = transcribe([load_utterance(clip) for clip in clips], model, processor)
    errors = [count_errors(clip.text, text) for clip, text in zip(clips, texts, strict=True)]
    assert corpus_wer(errors) < 0.3
    with pytest.raises(UsageError, match=r"clip lasts 31\.0 s"):
        transcribe([np.zeros(31 * 16_000, np.float32)], model, processor)
