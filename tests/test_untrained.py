"""Floors: a model before it heard speech, and before it learned anything."""

import pytest
import torch

import melprobe
from melprobe import capture
from melprobe.captured import Capture
from melprobe.errors import UsageError
from melprobe.model.untrained import untrain


def loaded(folder):
    return melprobe.load(folder / "model", device="cpu", dtype=torch.float32, merge=False)


def test_before_speech_the_base_is_as_it_was_behind_another_projection(folder, clips):
    lm, plain = loaded(folder), loaded(folder)
    untrain(lm.model, "front", 0)
    with plain.without_lora(range(plain.n_layers)):
        expected = plain.reading().score(["please hold"], ["one"]).log_probs
    found = lm.reading().score(["please hold"], ["one"]).log_probs
    torch.testing.assert_close(found, expected)
    weight = lm.model.audio_front.projection.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.05)  # the tiny model's own range
    assert not torch.equal(weight, plain.model.audio_front.projection.weight)
    assert not lm.model.audio_front.projection.bias.any()


def test_before_any_training_nothing_is_left_and_the_seed_says_what_is_there(folder):
    kept = dict(loaded(folder).model.named_parameters())
    models = []
    for seed in (0, 0, 1):
        lm = loaded(folder)
        untrain(lm.model, "all", seed)
        models.append(dict(lm.model.named_parameters()))
    one, same, other = models
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        if weight.ndim > 1 and "lora_" not in name:
            assert not torch.equal(weight, other[name]) and not torch.equal(weight, kept[name])


def test_a_capture_of_the_floor_says_so(folder, tmp_path):
    words = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    words += ["--device", "cpu", "--model-dtype", "float32", "--out"]
    capture.main([*words, str(tmp_path / "model")])
    capture.main([*words, str(tmp_path / "floor"), "--untrained", "all"])
    model, floor = (Capture.open(tmp_path / name) for name in ("model", "floor"))
    assert floor.index["settings"]["untrained"] == "all"
    assert "untrained" not in model.index["settings"]
    assert not torch.allclose(model.residual(0), floor.residual(0))
    with pytest.raises(UsageError, match="made with other settings"):
        capture.main([*words, str(tmp_path / "model"), "--untrained", "all"])
