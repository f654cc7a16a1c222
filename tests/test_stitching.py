"""Two models made into one: equal to models that are built so, restored afterwards, and scored."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from melprobe import stitch as command
from melprobe.analysis.stitching import (
    Pair,
    check_pair,
    fit_maps,
    score_stitching,
    stitch_rows,
)
from melprobe.corpus.manifest import read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.stitching import borrow_block, exchange_block, stitch
from melprobe.listener import Listener
from tests.tiny import N_LAYERS, TEXTS, WORDS, split_clips, tiny_listener, waves


@pytest.fixture(scope="module")
def pair():
    """Two random models with the same embeddings, front and all: only their blocks differ."""
    a, b = tiny_listener(0), tiny_listener(0)
    other = decoder_blocks(tiny_listener(1).model)
    decoder_blocks(b.model).load_state_dict(other.state_dict())
    return Pair(a, b)


def built(below, above, layer):
    """A model of the blocks of `below` up to `layer` and those of `above` from there."""
    model = copy.deepcopy(above.model)
    for number in range(layer):
        block = decoder_blocks(below.model)[number]
        decoder_blocks(model)[number].load_state_dict(block.state_dict())
    return Listener(model, above.processor)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_stitched_model_equals_one_that_is_built_so(pair, clips, layer):
    a, b = pair.replays(clips, TEXTS)
    with stitch(pair.b.model, layer, a.residuals[layer], torch.ones_like(a.kinds, dtype=bool)):
        heard = b.hear(layer)
    torch.testing.assert_close(heard.nll, built(pair.a, pair.b, layer).score(clips, TEXTS).nll)
    assert torch.equal(b.hear().nll, b.intact.nll)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_an_exchanged_block_equals_a_model_that_is_built_so(pair, clips, layer):
    a, b = pair.replays(clips, TEXTS)
    before = copy.deepcopy([lm.model.state_dict() for lm in pair])
    made = []
    for whole, own in ((pair.a, pair.b), (pair.b, pair.a)):
        model = copy.deepcopy(whole.model)
        block = decoder_blocks(own.model)[layer]
        decoder_blocks(model)[layer].load_state_dict(block.state_dict())
        made.append(Listener(model, whole.processor).score(clips, TEXTS).nll)
    with exchange_block(pair.a.model, pair.b.model, layer):
        torch.testing.assert_close(a.hear(layer).nll, made[0])
        torch.testing.assert_close(b.hear(layer).nll, made[1])
    with pytest.raises(KeyError), exchange_block(pair.a.model, pair.b.model, layer):
        raise KeyError
    for lm, state in zip(pair, before, strict=True):
        assert all(
            torch.equal(tensor, state[name]) for name, tensor in lm.model.state_dict().items()
        )


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_borrowed_block_between_maps_that_change_nothing_is_an_exchanged_one(pair, clips, layer):
    a, b = pair.replays(clips, TEXTS)
    everywhere = torch.ones_like(a.kinds, dtype=bool)
    with exchange_block(pair.a.model, pair.b.model, layer):
        exchanged = a.hear(layer)
    for where, donated in ((everywhere, b.residuals[layer]), (a.where("all"), a.residuals[layer])):
        with borrow_block(
            pair.a.model, pair.b.model, layer, donated, where, lambda h: h, lambda h: h
        ):
            borrowed = a.hear(layer + 1)
        torch.testing.assert_close(borrowed.nll, exchanged.nll)
    nowhere = torch.zeros_like(everywhere)
    with borrow_block(
        pair.a.model, pair.b.model, layer, b.residuals[layer], nowhere, lambda h: h, lambda h: h
    ):
        torch.testing.assert_close(a.hear(layer + 1).nll, a.intact.nll)


def test_what_does_not_fit_is_refused(pair, clips):
    a, _ = pair.replays(clips, TEXTS)
    with pytest.raises(UsageError, match=r"layers 4: this model has blocks 0 to 3"):  # noqa: SIM117
        with stitch(pair.b.model, N_LAYERS, a.residuals[0], a.kinds > 0):
            pass
    with (
        pytest.raises(UsageError, match=r"at block 1: a pass of .* both have to be the same batch"),
        stitch(pair.b.model, 1, a.residuals[1][:, 1:], a.kinds > 0),
    ):
        pair.b.score(clips, TEXTS)
    narrow = copy.deepcopy(pair.b.model)
    decoder_blocks(narrow)[2].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(60, 32))
    with (
        pytest.raises(UsageError, match="block 2 is of other shapes"),
        exchange_block(pair.a.model, narrow, 2),
    ):
        pass
    slow = tiny_listener(0, frames_per_patch=4)
    with pytest.raises(UsageError, match=r"patches in the same clips.*one token rate"):
        Pair(pair.a, slow).replays(clips, TEXTS)
    other = tiny_listener(0)
    other.processor.after = "one"
    with pytest.raises(UsageError, match=r"or other prompts: stitch models with .* one prompt"):
        Pair(pair.a, other).replays(clips, TEXTS)
    config = {"base": "one", "base_sha256": "1", "frames_per_patch": 8}
    ours = SimpleNamespace(**config)
    with pytest.raises(UsageError, match="over one, B over two: stitching needs one base"):
        check_pair(ours, SimpleNamespace(**config | {"base": "two", "base_sha256": "2"}))
    with pytest.raises(UsageError, match=r"12\.5 patches a second, B 25: .* one token rate"):
        check_pair(ours, SimpleNamespace(**config | {"frames_per_patch": 4}))


def rotated(lm: Listener) -> Listener:
    """The same function in other coordinates: all that writes the residual is turned by Q, all that

    reads it turned back. Gains of norms are one in a fresh model.
    """
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(5)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    turn = turn.float()

    def change(weight, *, reads):
        weight.data = weight.data @ turn if reads else turn.T @ weight.data

    change(model.get_input_embeddings().weight, reads=True)  # its rows are residuals; tied
    change(model.audio_front.projection.weight, reads=False)
    model.audio_front.projection.bias.data @= turn
    for block in decoder_blocks(model):
        for name in ("q_proj", "k_proj", "v_proj"):
            change(getattr(block.self_attn, name).weight, reads=True)
        for name in ("gate_proj", "up_proj"):
            change(getattr(block.mlp, name).weight, reads=True)
        change(block.self_attn.o_proj.weight, reads=False)
        change(block.mlp.down_proj.weight, reads=False)
    return Listener(model, lm.processor)


def test_a_rotated_copy_needs_the_map_and_no_more():
    """It says the same. Stitched as it is it fails; through the affine map it doesn't."""
    lm = tiny_listener(3)
    pair = Pair(lm, rotated(lm))
    clips = waves(*np.linspace(0.5, 1.1, 24))
    texts = [
        f"{WORDS[i % 12]} {WORDS[(i + 1 + i // 12) % 12]} {WORDS[i * 5 % 12]}" for i in range(24)
    ]
    torch.testing.assert_close(*(one.score(clips, texts).nll for one in pair), atol=1e-3, rtol=1e-4)
    maps = fit_maps(pair, clips[4:], texts[4:])
    rows = stitch_rows(pair, maps, clips[:4], [1, 0, 3, 2], texts[:4], lambda n: None)
    nll = rows.pivot(index=["arm", "condition", "layer"], columns="clip", values="nll")
    for arm in ("A", "B"):
        intact = nll.loc[arm, "intact", -1]

        def moved(condition, layer, arm=arm, intact=intact):
            return (nll.loc[arm, condition, layer] - intact).abs().mean()

        for layer in range(N_LAYERS):
            assert moved("stitched, mapped", layer) < 0.1
            assert moved("exchanged, mapped", layer) < 0.1
            assert min(moved("stitched", layer), moved("exchanged", layer)) > 0.5


def test_damage_is_beside_the_arm_that_hears_less_or_the_arm_itself():
    nll = {
        ("A", "intact", -1): 1.0,
        ("A", "swapped", -1): 5.0,
        ("B", "intact", -1): 2.0,
        ("B", "swapped", -1): 4.0,
        ("A", "stitched", 0): 3.0,
        ("A", "stitched, mapped", 0): 1.5,
        ("A", "exchanged", 0): 3.0,
        ("A", "exchanged, mapped", 0): 1.0,
        ("B", "stitched", 0): 2.0,
        ("B", "stitched, mapped", 0): 4.0,
        ("B", "exchanged", 0): 2.5,
        ("B", "exchanged, mapped", 0): 2.0,
    }
    clips = range(12)
    rows = pd.DataFrame(
        [
            {"clip": i, "arm": arm, "condition": c, "layer": layer, "nll": x, "tokens": 2}
            for (arm, c, layer), x in nll.items()
            for i in clips
        ]
    )
    scores = score_stitching(rows, [f"speaker {i}" for i in clips], 0)
    assert scores["worse"] == "B" and scores["intervals"]["unit"] == "speaker"
    found = {(x["arm"], x["condition"]): (x["damage"], x["delta_nll"]) for x in scores["layers"]}
    assert found == {
        ("A", "stitched"): (0.5, 0.5),
        ("A", "stitched, mapped"): (-0.25, -0.25),
        ("A", "exchanged"): (0.5, 1.0),  # beside A itself
        ("A", "exchanged, mapped"): (0.0, 0.0),
        ("B", "stitched"): (0.0, 0.0),
        ("B", "stitched, mapped"): (1.0, 1.0),
        ("B", "exchanged"): (0.25, 0.25),
        ("B", "exchanged, mapped"): (0.0, 0.0),
    }


def test_the_command(folder, tmp_path, capsys):
    clips = read_manifest(folder / "data.jsonl")
    write_manifest(tmp_path / "dev.jsonl", clips[:2])
    again = [
        replace(u, audio=shutil.copy(u.audio, tmp_path / f"again-{u.audio.name}"))
        for u in clips[2:]
    ]
    # Maps need more positions than there are dimensions.
    write_manifest(tmp_path / "train.jsonl", [*clips[2:], *again])
    other = tmp_path / "other"
    shutil.copytree(folder / "model", other)
    adapter = load_file(other / "adapter.safetensors")
    save_file(
        {name: -x if "lora_B" in name else x for name, x in adapter.items()},
        other / "adapter.safetensors",
    )
    words = [str(folder / "model"), str(other), "--data", str(tmp_path / "dev.jsonl")]
    words += ["--fit", str(tmp_path / "train.jsonl"), "--dtype", "float32"]
    command.main([*words, "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told.count("listening gate NOT passed: nothing below speaks of listening") == 2
    assert results["arms"]["A"]["sha256"] != results["arms"]["B"]["sha256"]
    assert len(results["layers"]) == 2 * 4 * N_LAYERS
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    assert len(rows) == 2 * 2 * (2 + 4 * N_LAYERS) and rows.utterance.nunique() == 2
    # Nothing is there to be changed between a model and itself.
    command.main([words[0], *words[:1], *words[2:], "--out", str(tmp_path / "self")])
    results = json.loads((tmp_path / "self" / "results.json").read_text())
    for layer in results["layers"]:
        if not layer["condition"].endswith("mapped"):
            assert layer["delta_nll"] == pytest.approx(0, abs=1e-6)


def test_bad_input_of_the_command(folder, tmp_path):
    split_clips(folder, tmp_path)
    model, data = str(folder / "model"), str(tmp_path / "train.jsonl")

    def refused(match, *words):
        with pytest.raises(UsageError, match=match):
            command.main([model, model, "--data", data, "--out", str(tmp_path / "out"), *words])

    refused(r"says 4 of the texts of --data .* fit the maps on other clips", "--fit", data)
    refused("no clip lasts so long", "--fit", data, "--lengths", "0-0.1")
    refused("nowhere.jsonl: neither a manifest file nor a corpus", "--fit", "nowhere.jsonl")
    with pytest.raises(UsageError, match="no checkpoint 'nobody'"):
        command.main([model, "nobody"])
    assert not (tmp_path / "out").exists()
