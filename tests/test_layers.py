"""Blocks and positions are named, parsed and refused in one place."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks, format_layers, parse_layers
from melprobe.hooks.positions import Kind, position_kinds
from tests.tiny import N_LAYERS, tiny_listener


def test_positions_are_named_after_the_token_that_stands_there():
    ids = torch.tensor([[9, 0, 7, 7, 5, 6, 1], [0, 7, 5, 6, 1, 9, 9]])
    mask = (ids != 9).long()
    labels = torch.where((ids == 6) | (ids == 1), ids, -100)
    kinds = position_kinds(ids, 7, mask, labels)
    p, b, t, s, a = Kind.PADDING, Kind.BOS, Kind.PROMPT, Kind.SPEECH, Kind.ANSWER
    assert kinds.tolist() == [[p, b, s, s, t, a, a], [b, s, t, a, a, p, p]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,9", "blocks 0 to 3"),
        ("", "'' is not a number"),
        ("2-1", "runs backwards"),
        ("a", "'a' is not a number"),
        ("3-", "'3-' is not a number"),
        ("\N{ARABIC-INDIC DIGIT THREE}", "is not a number"),
        ("0-99999999999", "layers 99999999999: this model has blocks 0 to 3"),
    ],
)
def test_bad_layers_say_what_there_is(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_layers(text, N_LAYERS)


def test_layers_are_parsed_and_written_alike():
    assert parse_layers("3,0-1", N_LAYERS) == [0, 1, 3]
    assert format_layers([3, 5, 6, 7, 8, 1]) == "1,3,5-8"


def test_a_decoder_that_keeps_its_blocks_elsewhere_is_named():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    with pytest.raises(UsageError, match="GPT2Model has no list of blocks named `layers`"):
        decoder_blocks(GPT2LMHeadModel(config))


def test_unknown_positions_and_layers_are_refused():
    lm = tiny_listener()
    with pytest.raises(UsageError, match="speech, answer, text, all"), lm.skip({0}, "vowels"):
        pass
    with pytest.raises(UsageError, match="blocks 0 to 3"), lm.skip({4}):
        pass
    for layers in (3, "3,5", [0.5]):
        with pytest.raises(UsageError, match=r"a set of layers such as \{3, 5\}"), lm.skip(layers):
            pass
