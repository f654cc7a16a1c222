"""Blocks that are gone: the model without them, and the command that makes it."""

import json
from pathlib import Path

import pytest
import torch

import melprobe
from melprobe import evaluate, prune
from melprobe.analysis.findings import targets_after
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.model.prune import drop_blocks
from tests.tiny import N_CLIPS, N_LAYERS, log_probs, tiny_listener, waves


@pytest.mark.parametrize("layers", [{0}, {1, 2}, {N_LAYERS - 1}])
def test_a_model_without_blocks_is_one_that_skips_them_everywhere(lm, clips, layers):
    with lm.skip(layers, "all"):
        expected, heard = log_probs(lm, clips), lm.transcribe(clips, 12)
    pruned = tiny_listener()
    drop_blocks(pruned.model, layers)
    assert pruned.n_layers == N_LAYERS - len(layers)
    assert torch.equal(log_probs(pruned, clips), expected)
    assert pruned.transcribe(clips, 12) == heard
    with pruned.skip({0}):  # hooks find their way on it
        assert not torch.equal(log_probs(pruned, clips), expected)


def test_lists_with_an_entry_for_each_block_lose_theirs(lm):
    pruned = tiny_listener()
    pruned.model.config.text_config.no_rope_layers = [1, 0, 1, 0]
    drop_blocks(pruned.model, {1})
    assert pruned.model.config.text_config.no_rope_layers == [1, 1, 0]


def command(folder, out, *words):
    checkpoint, data = str(folder / "model"), str(folder / "data.jsonl")
    return [
        "--checkpoint",
        checkpoint,
        "--data",
        data,
        "--device",
        "cpu",
        "--out",
        str(out),
        *words,
    ]


def test_the_command_writes_a_model_and_what_it_cost(folder, tmp_path, capsys):
    words = ["--layers", "1-2", "--dtype", "float32"]
    prune.main(command(folder, tmp_path / "small", *words))
    printed = json.loads(capsys.readouterr().out)
    found = json.loads((tmp_path / "small" / "prune.json").read_text())
    assert found == printed and found["blocks_taken_out"] == "1-2"
    before, after = found["before"], found["after"]
    assert (before["blocks"], after["blocks"]) == (N_LAYERS, N_LAYERS - 2)
    assert after["weights_mb"] < before["weights_mb"] and after["utterances"] == N_CLIPS
    assert found["delta_wer"] == pytest.approx(after["wer"] - before["wer"])

    assert (tmp_path / "small" / "data.json").exists() and found["targets_after"] == []
    whole = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    small = melprobe.load(tmp_path / "small", device="cpu", dtype=torch.float32)
    assert len(decoder_blocks(small.model)) == N_LAYERS - 2
    clips = waves(0.8, 0.5)
    with whole.skip({1, 2}, "all"):
        assert small.transcribe(clips, 12) == whole.transcribe(clips, 12)
    evaluate.main(
        [str(folder / "data.jsonl"), "--checkpoint", str(tmp_path / "small"), "--device", "cpu"]
    )
    assert json.loads(capsys.readouterr().out)["utterances"] == N_CLIPS


def test_a_pruned_model_still_says_where_it_was_told_to_listen(tmp_path):
    words = Path(__file__).parent / "data" / "words.jsonl"
    place = ["--checkpoint", "mel-mini", "--data", str(words), "--device", "cpu"]
    prune.main([*place, "--limit", "2", "--layers", "1,6", "--out", str(tmp_path / "small")])
    # Blocks 4 and 6 of ten; 1 and 6 are gone, so 4 is third and 5 takes the place of 6.
    assert targets_after(tmp_path / "small") == [3, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "9"], "layers 9: this model has blocks 0 to 3"),
        (["--layers", "0-3"], "all 4 blocks would go"),
        (["--layers", ""], "is not a number"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        prune.main(command(folder, tmp_path / "small", *words))
    assert not (tmp_path / "small").exists()


def test_a_folder_that_holds_something_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        prune.main(command(folder, tmp_path, "--layers", "1"))


def test_lora_must_be_folded_in(folder):
    lm = melprobe.load(folder / "model", device="cpu", merge=False)
    with pytest.raises(UsageError, match="merge=True"):
        drop_blocks(lm.model, {1})


def test_killed_while_it_writes_it_leaves_the_place_free(folder, tmp_path, monkeypatch):
    def half(model, processor, out, dtype):
        (out / "config.json").write_text("{")
        raise KeyboardInterrupt

    words = command(folder, tmp_path / "v1.0", "--layers", "1", "--dtype", "float32")
    with monkeypatch.context() as patched:
        patched.setattr(prune.checkpoint, "save", half)
        with pytest.raises(KeyboardInterrupt):
            prune.main(words)
    assert not (tmp_path / "v1.0").exists()
    prune.main(words)
    assert {path.name for path in tmp_path.iterdir()} == {"v1.0"}
