"""Planted truths: blocks whose need is known, put into a model that hears, are found as such.

mel-mini, with blocks between its own:

- `identity` does nothing;
- `one` and `other` add a vector and take it away again: neither can go, both can;
- `speech` takes away what stands beside the audio front's patches, and there only;
- `text` takes away what stands beside the embeddings of tokens, and there only.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import melprobe
from melprobe.analysis.choice import Trials, beam_search, choose_sets
from melprobe.analysis.damage import DAMAGE_MARGIN, score_layers
from melprobe.analysis.question import Question
from melprobe.analysis.study import LayerStudy, swap_partners
from melprobe.analysis.sweep import run_layer_study
from melprobe.audio.load import load_utterance
from melprobe.corpus.manifest import read_manifest
from melprobe.corpus.text import plain_text
from melprobe.hooks.layers import decoder_blocks, format_layers
from melprobe.hooks.parts import Target
from melprobe.report.reading import EACH_BLOCK, outcome
from melprobe.store import RowStore

WORDS = Path(__file__).parent / "data" / "words.jsonl"
LARGE = 1000.0
PLANTED = ["speech", "text", "identity", "one", "other"]


class Adds(nn.Module):
    """In the place of a block's MLP."""

    def __init__(self, vector):
        super().__init__()
        self.vector = vector

    def forward(self, hidden):
        return self.vector.expand_as(hidden)


class Removes(nn.Module):
    """Removes `vector` where it stands; wraps a block, whose cache goes on as ever."""

    def __init__(self, block, vector):
        super().__init__()
        self.block, self.vector = block, vector

    def forward(self, hidden, *args, **kwargs):
        self.block(hidden, *args, **kwargs)
        there = hidden @ self.vector > self.vector.square().sum() / 2
        return hidden - there[..., None] * self.vector


class WithVector(nn.Module):
    """What a module gives, and a vector beside it."""

    def __init__(self, module, vector):
        super().__init__()
        self.module, self.vector = module, vector

    def forward(self, *args):
        return self.module(*args) + self.vector


def idle(block, layer_idx):
    """A copy that adds nothing to the residual."""
    block = copy.deepcopy(block)
    block.self_attn.layer_idx = layer_idx
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    return block


@pytest.fixture(scope="module")
def planted():
    """The model, and where each planted block stands."""
    return plant(melprobe.load("mel-mini", device="cpu", dtype=torch.float32))


@pytest.fixture(scope="module")
def copying():
    """The same in mel-mini without what speech training changed, which copies text."""
    listener = melprobe.load("mel-mini", device="cpu", dtype=torch.float32, merge=False)
    for module in listener.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    listener, place = plant(listener)
    return listener.reading(), place


def plant(listener):
    """Put the blocks in; returns the model, and where each stands."""
    model, own = listener.model, decoder_blocks(listener.model)
    generator = torch.Generator().manual_seed(0)
    width = model.config.text_config.hidden_size
    beside, also, apart = (
        nn.functional.normalize(torch.randn(3, width, generator=generator)) * LARGE
    )
    blocks = [Removes(idle(own[0], 0), beside), Removes(idle(own[0], 1), also)]
    blocks += own[:3]
    for vector in (0 * apart, apart, -apart):
        blocks.append(idle(own[0], len(blocks)))
        blocks[-1].mlp = Adds(vector)
    blocks += own[3:]
    for place, block in enumerate(blocks[2:], 2):
        block.self_attn.layer_idx = place
    model.get_decoder().layers = nn.ModuleList(blocks)
    for config in {
        id(c): c for c in (model.config.text_config, model.get_decoder().config)
    }.values():
        config.num_hidden_layers = len(blocks)
    model.audio_front = WithVector(model.audio_front, beside)
    model.set_input_embeddings(WithVector(model.get_input_embeddings(), also))
    return listener, dict(zip(PLANTED, (0, 1, 5, 6, 7), strict=True))


def study_of(targets, positions="speech", layers=EACH_BLOCK, copy_text=False):
    utterances = read_manifest(WORDS)
    read = [plain_text(u.text) for u in utterances]
    return LayerStudy(
        run="planted",
        utterances=utterances,
        given=read if copy_text else [load_utterance(u) for u in utterances],
        partners=swap_partners(utterances),
        question=Question("skip", positions, layers, copy_text=copy_text),
        targets=targets,
        max_new_tokens=16,
    )


def scored(listener, targets, positions, path, copy_text=False):
    """Layers of results.json, by label."""
    study = study_of(targets, positions, copy_text=copy_text)
    labels = [target.label for target in targets]
    with RowStore(path, {}) as store:
        run_layer_study(listener, study, store, lambda n: None)
        results = score_layers(store.frame(), "skip", labels, positions, None, 0)
    assert results["gate"]["passed"]
    return dict(zip(labels, results["layers"], strict=True))


def test_the_model_still_hears(planted):
    listener, _ = planted
    utterances = read_manifest(WORDS)[:6]
    waves = [load_utterance(u) for u in utterances]
    plain = melprobe.load("mel-mini", device="cpu", dtype=torch.float32)
    assert listener.transcribe(waves, 40) == plain.transcribe(waves, 40)


@pytest.mark.parametrize(
    ("positions", "needed"),
    [
        ("speech", {"speech", "one", "other"}),
        ("text", {"text", "one", "other"}),
        ("all", {"speech", "text", "one", "other"}),
    ],
)
def test_each_block_is_found_as_what_it_is(planted, tmp_path, positions, needed):
    listener, place = planted
    targets = [Target((block,)) for block in place.values()]
    check_found(scored(listener, targets, positions, tmp_path / "rows"), place, needed)


def test_the_control_tells_what_text_needs_from_what_speech_alone_does(copying, tmp_path):
    listener, place = copying
    targets = [Target((block,)) for block in place.values()]
    layers = scored(listener, targets, "prompt", tmp_path / "rows", copy_text=True)
    check_found(layers, place, {"text", "one", "other"})


def check_found(layers, place, needed):
    for name, block in place.items():
        layer = layers[str(block)]
        if name in needed:
            assert outcome(layer, DAMAGE_MARGIN) == "costly", name
        else:
            assert layer["damage"] == 0 and layer["damage_ci"] == (0, 0), name
            assert layer["delta_wer"] == 0 and layer["kl"] == 0, name


def test_two_blocks_that_cancel_can_go_together(planted, tmp_path):
    listener, place = planted
    pair = Target((place["one"], place["other"]))
    (layer,) = scored(listener, [pair], "speech", tmp_path / "rows").values()
    assert abs(layer["damage"]) < 1e-3 and layer["delta_wer"] == 0
    assert outcome(layer, DAMAGE_MARGIN) == "spare"


def test_beam_search_finds_the_pair_that_greedy_search_passes_by(planted, tmp_path):
    """Each of the pair alone costs more than a block of the model's own."""
    listener, place = planted
    own = (8, 9)
    pair = frozenset({place["one"], place["other"]})
    with RowStore(tmp_path / "rows", {}) as store:
        trials = Trials(listener, study_of([]).of(range(6)), store, lambda n: None)
        blocks = [*own, *pair]
        assert beam_search(trials, blocks, 2, width=4) == pair
        assert beam_search(trials, blocks, 2, width=1) == frozenset(own)


def test_greedy_drops_what_does_nothing_first_and_stops_behind_the_margin(planted, tmp_path):
    listener, place = planted
    study = study_of([Target((block,)) for block in sorted(place.values())], layers="greedy").of(
        range(12)
    )
    tried = []
    with RowStore(tmp_path / "rows", {}) as store:
        chosen = choose_sets(listener, study, store, tried.append)
        again = choose_sets(listener, study, store, pytest.fail)
        known = store.tried()
    assert again.ways == chosen.ways  # nothing was tried a second time
    first, second, third = (set(target.layers) for target in chosen.study.targets)
    assert second == {place["identity"], place["text"]} and first < second < third
    assert known[format_layers(third)] > DAMAGE_MARGIN
    assert chosen.n_tried == len(known) == len(tried) == 5 + 4 + 3
    assert chosen.n_clips == len(chosen.study.utterances) == 6
