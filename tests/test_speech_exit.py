"""Speech that leaves after a middle block: the skip of all blocks above, for less work."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import melprobe
from melprobe import ablate, capture, evaluate, prune, transcribe
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.parts import parts_of
from melprobe.listener import Listener
from melprobe.model.config import MelLLMConfig
from melprobe.model.memory import peak_bytes
from melprobe.model.modelling import MelLLMForConditionalGeneration
from melprobe.model.prune import drop_blocks, let_speech_exit
from tests.test_prune import command
from tests.tiny import N_CLIPS, N_LAYERS, TEXTS, log_probs, tiny_config, tiny_listener, waves

EXITS = [0, 1, N_LAYERS - 2]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def leaving(after, **fields):
    lm = tiny_listener(**fields)
    let_speech_exit(lm.model, after)
    return lm


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("after", EXITS)
def test_it_is_the_skip_of_all_blocks_above(clips, after, attention):
    whole, other = tiny_listener(), leaving(after)
    for model in (whole.model, other.model):
        model.set_attn_implementation(attention)
    inputs = whole.processor(clips)
    one = whole.processor(clips[:1])  # without padding, attention gets no mask
    with whole.skip(range(after + 1, N_LAYERS)):
        expected, heard = log_probs(whole, clips), whole.model.generate(**inputs, **GREEDY)
        alone, heard_alone = whole.model(**one).logits, whole.model.generate(**one, **GREEDY)
    assert close(log_probs(other, clips), expected)
    assert close(other.model(**one).logits, alone)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(other.model.generate(**inputs, **GREEDY, **options), heard)
        assert torch.equal(other.model.generate(**one, **GREEDY, **options), heard_alone)
    assert after == N_LAYERS - 2 or not close(log_probs(whole, clips), expected)


def test_logits_are_kept_as_in_any_model(lm, clips):
    other, inputs = leaving(1), lm.processor(clips)
    there = inputs["attention_mask"].bool()
    with lm.skip({2, 3}):
        expected = lm.model(**inputs).logits
    logits = other.model(**inputs).logits  # of speech too
    assert close(logits[there], expected[there])
    for keep in (1, 3):
        found = other.model(**inputs, logits_to_keep=keep).logits
        assert close(found, logits[:, -keep:])
    places = torch.tensor([4, 9])
    assert close(other.model(**inputs, logits_to_keep=places).logits, logits[:, places])
    assert close(other.model(**inputs, logits_to_keep=there).logits, logits[there])


def test_patches_may_look_ahead_below_the_exit(clips):
    lm = tiny_listener(audio_attention="bidirectional")
    other = leaving(1, audio_attention="bidirectional")
    with lm.skip({2, 3}):
        expected, heard = log_probs(lm, clips), lm.transcribe(clips, 12)
    assert close(log_probs(other, clips), expected)
    assert other.transcribe(clips, 12) == heard


def test_the_blocks_above_work_on_text_alone(clips):
    """As many positions as the longest text has; only keys and values are made of speech."""
    other = leaving(1)
    inputs = other.processor(clips)
    speech = inputs["input_ids"] == other.processor.audio_token_id
    n_text = int((inputs["attention_mask"].bool() & ~speech).sum(1).max())
    rows: dict[str, list[int]] = {"mlp": [], "q_proj": [], "o_proj": [], "k_proj": []}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].shape[1])
        )
        for block in decoder_blocks(other.model)
        for name, module in (
            ("mlp", block.mlp),
            *((name, getattr(block.self_attn, name)) for name in rows if name != "mlp"),
        )
    ]
    other.model(**inputs)
    for handle in handles:
        handle.remove()
    width, n_speech = speech.shape[1], int(speech.sum(1).max())
    for name in ("mlp", "q_proj", "o_proj"):
        assert rows[name] == [width, width, n_text, n_text]
    assert rows["k_proj"] == [width, width, n_speech, n_text, n_speech, n_text]


@pytest.mark.parametrize("front", ["linear", "conv"])
def test_what_stands_in_padding_changes_nothing(clips, front):
    other = leaving(1, audio_front=front)
    for texts in (None, TEXTS):
        batch = other.processor(clips, texts)
        there = batch["attention_mask"].bool()
        keep = {} if texts else {"logits_to_keep": there}
        plain = other.model(**batch, **keep).logits
        batch["input_features"][~batch["feature_attention_mask"]] = torch.nan
        assert torch.equal(other.model(**batch, **keep).logits, plain)
        poison = other.model.get_input_embeddings().register_forward_hook(
            lambda _, args, output, there=there: output.masked_fill(~there[..., None], 1e4)
        )
        assert torch.equal(other.model(**batch, **keep).logits, plain)
        poison.remove()


def test_a_row_without_speech_and_rows_of_other_lengths_share_a_batch(lm, clips):
    """A text prompt has no patches; its longer text makes the others' rows short."""
    other, inputs = leaving(0), lm.processor(clips[:1])
    words = lm.processor.text_prompt("please hold the new number three")
    ids = inputs["input_ids"].repeat(2, 1)
    ids[1], mask = lm.processor.tokenizer.pad_token_id, torch.ones_like(ids)
    mask[1, : -len(words)], ids[1, -len(words) :] = 0, torch.tensor(words)
    features = inputs["input_features"].repeat(2, 1, 1)
    frames = inputs["feature_attention_mask"].repeat(2, 1)
    frames[1] = False
    batch = {"input_features": features, "feature_attention_mask": frames, "attention_mask": mask}
    with lm.skip({1, 2, 3}):
        expected = lm.model(input_ids=ids, **batch).logits
    assert close(other.model(input_ids=ids, **batch).logits[mask.bool()], expected[mask.bool()])


def test_a_placeholder_that_the_model_writes_is_no_speech(clips):
    other = leaving(1)
    inputs, cache = other.processor(clips), DynamicCache()
    other.model(**inputs, past_key_values=cache)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    written = torch.full((len(clips), 1), other.processor.audio_token_id)
    seen = []
    mlp = decoder_blocks(other.model)[3].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    other.model(input_ids=written, attention_mask=mask, past_key_values=cache)
    handle.remove()
    assert seen == [1]


def test_gradients_flow_as_under_the_skip(lm, clips):
    other, inputs = leaving(1), lm.processor(clips, TEXTS)
    with lm.skip({2, 3}):
        lm.model(**inputs).loss.backward()
    other.model(**inputs).loss.backward()
    for (name, one), two in zip(lm.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-5), name
    lm.model.zero_grad()


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    "text_config",
    [
        Qwen2Config(**SMALL),
        Qwen3Config(head_dim=8, **SMALL),
        MistralConfig(sliding_window=None, **SMALL),
        Olmo2Config(**SMALL),  # norms behind, and over all heads at once
        SmolLM3Config(no_rope_layers=[1, 1, 0], **SMALL),
        Qwen2Config(
            use_sliding_window=True, sliding_window=16, max_window_layers=1, **SMALL
        ),  # the windows are above
        MistralConfig(sliding_window=16, **SMALL),
        Phi3Config(**SMALL),
    ],
    ids=["qwen2", "qwen3", "mistral", "olmo2", "smollm3", "windows above", "windows", "phi3"],
)
def test_any_decoder_will_do_that_sees_everything_and_has_queries_apart(text_config, request):
    torch.manual_seed(0)
    lm = tiny_listener()
    config = MelLLMConfig(text_config=text_config, audio_token_id=lm.processor.audio_token_id)
    other = Listener(MelLLMForConditionalGeneration(config).eval(), lm.processor)
    refused = {
        "windows above": "has sliding_attention; speech can leave only below blocks",
        "windows": "has sliding_attention",
        "phi3": r"Phi3DecoderLayer has no `self_attn\.q_proj`",
    }
    for name, message in refused.items():
        if request.node.callspec.id == name:
            with pytest.raises(UsageError, match=message):
                let_speech_exit(other.model, 0)
            return
    clips = waves(1.0, 0.6, 0.8)
    with other.skip({1, 2}):
        expected, heard = log_probs(other, clips), other.transcribe(clips, 8)
    assert not close(log_probs(other, clips), expected)
    let_speech_exit(other.model, 0)
    assert close(log_probs(other, clips), expected)
    assert other.transcribe(clips, 8) == heard


def test_attention_without_masks_and_blocks_with_more_to_say_are_refused(clips, monkeypatch):
    other = leaving(1)
    config = other.model.get_decoder().config
    with monkeypatch.context() as patch:
        patch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(UsageError, match="flash_attention_2' can't leave speech out"):
            log_probs(other, clips)
    first = decoder_blocks(other.model)[2]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "per_layer_input": args[0]}), with_kwargs=True
    )
    with pytest.raises(UsageError, match="LlamaDecoderLayer is given per_layer_input"):
        log_probs(other, clips)
    handle.remove()
    with pytest.raises(UsageError, match="output_hidden_states: above block 1"):
        other.model(**other.processor(clips), output_hidden_states=True)
    assert not any(block._forward_pre_hooks for block in decoder_blocks(other.model))
    log_probs(other, clips)


def test_below_the_exit_interventions_work_and_above_they_are_refused(lm, clips):
    other = leaving(2)
    with lm.skip({1, 3}), lm.knock_out({0}):
        expected = log_probs(lm, clips)
    with other.skip({1}), other.knock_out({0}):
        assert close(log_probs(other, clips), expected)
    with lm.skip({3}), lm.ablate(parts_of(lm.model, "mlp", {2})):
        expected = log_probs(lm, clips)
    with other.ablate(parts_of(other.model, "mlp", {2})):
        assert close(log_probs(other, clips), expected)
    refusals = [
        lambda: other.skip({1, 3}, "text"),
        lambda: other.knock_out({3}, "bos"),
        lambda: other.knock_out({3}, readers="speech"),
        lambda: other.bypass({3}),
        lambda: other.ablate(parts_of(other.model, "head")),
        other.watch_blocks,
    ]
    message = "speech leaves this model after block 2, so blocks 3 can't be cut or watched"
    for begin in refusals:
        with pytest.raises(UsageError, match=message), begin():
            pass
    with pytest.raises(UsageError, match=message):
        other.replay(clips, TEXTS)


def test_residuals_are_captured_as_far_as_speech_goes(lm, clips):
    """What leaves the last block is no h_L of all positions."""
    other, seen = leaving(1), []
    with other.capture({0, 1}, take=seen.append), lm.capture({0, 1}, take=seen.append):
        log_probs(other, clips), log_probs(lm, clips)
    assert torch.equal(seen[0].residuals, seen[1].residuals)
    message = "after block 1, so blocks 3 can't be cut or watched"
    with pytest.raises(UsageError, match=message), other.capture({N_LAYERS}, "bos", take=print):
        pass


def test_the_command_writes_a_model_that_others_load_and_hear_with(folder, tmp_path, capsys):
    out = tmp_path / "early"
    prune.main(command(folder, out, "--speech-exit", "1", "--dtype", "float32"))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "prune.json").read_text())
    assert found["speech_exit"] == 1 and "blocks_taken_out" not in found
    before, after = found["before"], found["after"]
    assert before["blocks"] == after["blocks"] == N_LAYERS
    assert before["weights_mb"] == after["weights_mb"] < before["peak_mb"]
    for measured in (before, after):
        assert measured["prefill_seconds"] > 0 and measured["seconds"] > 0

    whole = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    early = melprobe.load(out, device="cpu", dtype=torch.float32)
    clips = waves(0.8, 0.5)
    with whole.skip({2, 3}):
        expected, heard = log_probs(whole, waves(0.8, 0.5, 0.6)), whole.transcribe(clips, 12)
    assert close(log_probs(early, waves(0.8, 0.5, 0.6)), expected)
    assert early.transcribe(clips, 12) == heard
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    inputs = whole.processor(clips)
    assert close(again(**inputs).logits[:, -1], early.model(**inputs).logits[:, -1])
    early.model.save_pretrained(tmp_path / "again")
    again = MelLLMForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert again.config.speech_exit == 1
    assert torch.equal(again(**inputs).logits, early.model(**inputs).logits)

    where = ["--checkpoint", str(out), "--device", "cpu"]
    evaluate.main([str(folder / "data.jsonl"), *where])
    assert json.loads(capsys.readouterr().out)["utterances"] == N_CLIPS
    transcribe.main([str(folder / "0.flac"), *where])
    assert "pred_text" in json.loads(capsys.readouterr().out)
    study = ["--skip-layers", "--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="speech leaves this model after block 1, so blocks 2-3"):
        ablate.main([*study, *where])
    with pytest.raises(UsageError, match="speech leaves this model after block 1, so blocks 2-3"):
        capture.main([*study[1:], *where])
    assert not (tmp_path / "run").exists()
    for words in (["--layers", "0"], ["--speech-exit", "0"]):
        with pytest.raises(UsageError, match="after block 1 already: prune the one it was made"):
            prune.main(
                [*where, "--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "x"), *words]
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--speech-exit", "3"], "speech exit 3: take a block from 0 to 2; block 3 is the last"),
        (["--speech-exit", "-1"], "speech exit -1: take a block from 0 to 2"),
        (["--speech-exit", "one"], "invalid int value"),
        (["--speech-exit", "1", "--layers", "2"], "not allowed with argument"),
        ([], "one of the arguments --layers --speech-exit is required"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        prune.main(command(folder, tmp_path / "early", *words))
    assert not (tmp_path / "early").exists()


def test_a_config_that_the_decoder_cannot_follow_is_refused():
    with pytest.raises(UsageError, match="speech exit 4: take a block from 0 to 2"):
        MelLLMForConditionalGeneration(tiny_config(speech_exit=4))


def test_an_exited_model_keeps_its_blocks():
    with pytest.raises(UsageError, match="speech leaves this model after block 1 already"):
        drop_blocks(leaving(1).model, {0})


def test_peak_bytes_are_those_that_live_at_once():
    model = torch.nn.Linear(10, 10)  # 440 bytes
    kept = []

    def work():
        kept.append(torch.zeros(1000))
        for _ in range(3):
            torch.zeros(500)

    assert peak_bytes(model, work) == 440 + 4000 + 2000
    assert peak_bytes(model, lambda: None) == 440
