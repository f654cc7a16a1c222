"""Other people's speech LLMs, and a plain one: cuts equal a loop over their blocks by hand, to 0.

All on random weights of each class's own kind; no real ones were at hand.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, DynamicCache

import melprobe
from melprobe import ablate
from melprobe.errors import UsageError
from melprobe.hooks.anatomy import Anatomy, anatomy
from melprobe.hooks.capture import capture
from melprobe.hooks.cuts import bypass, knock_out, skip, watch_blocks
from melprobe.hooks.layers import decoder_blocks
from melprobe.hooks.positions import position_kinds, selected
from melprobe.model.checkpoint import find_checkpoint
from melprobe.model.memory import study_bytes
from melprobe.model.others import LISTENING, OtherProcessor
from tests.foreign import (
    FOREIGN,
    HEARING,
    N_LAYERS,
    SPEECH,
    foreign_listener,
    positions_of,
    prompts,
    scaled,
    tokenizer,
)
from tests.tiny import tiny_manifest, waves


@pytest.fixture(scope="module", params=FOREIGN)
def foreign(request):
    """A model, its prompts, and where it is cut."""
    torch.manual_seed(0)
    model = scaled(FOREIGN[request.param].build())
    model.generation_config.eos_token_id = None  # random weights end at once, or never
    inputs = prompts(request.param, waves(0.9, 0.5))
    return model, inputs, "text" if request.param == "llama" else "speech"


@contextmanager
def noting(model) -> Iterator[list]:
    """What each block of the running pass is given, in order."""
    calls, handles = [], []
    for block in decoder_blocks(model):
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        handles.append(handle)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def by_hand(model, inputs, skipped, where):
    """Final residuals (B, S, D) when blocks leave `where` (B, S) as it was."""
    with noting(model) as calls:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False)
    hidden = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    for layer, (block, args, kwargs) in enumerate(calls):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        new = block(hidden, *args[1:], **rest)
        hidden = torch.where(where[..., None], hidden, new) if layer in skipped else new
    return model.get_decoder().norm(hidden)


@torch.no_grad()
def final(model, inputs):
    """Final residuals (B, S, D) of a pass under whatever hooks are active."""
    seen = []
    handle = model.get_decoder().norm.register_forward_hook(
        lambda m, a, output: seen.append(output)
    )
    try:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False, labels=None)
    finally:
        handle.remove()
    return seen[0]


def places(model, inputs, positions):
    kinds = position_kinds(
        inputs["input_ids"], anatomy(model).audio_token_id, inputs["attention_mask"]
    )
    return selected(kinds, positions, anatomy(model))


@pytest.mark.parametrize("layers", [{0}, {1, 2}, {N_LAYERS - 1}, set(range(N_LAYERS))])
def test_a_skip_is_the_loop_by_hand(foreign, layers):
    model, inputs, positions = foreign
    expected = by_hand(model, inputs, layers, places(model, inputs, positions))
    plain = final(model, inputs)
    with skip(model, layers, positions):
        assert torch.equal(final(model, inputs), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(final(model, inputs), plain)


@torch.no_grad()
def hidden_by_hand(model, inputs, layers, where, *, process):
    """Final residuals when other positions of these blocks don't see `where` (B, S)."""
    unread = where[:, None, None, :] & ~where[:, None, :, None]
    with noting(model) as calls:
        model(**inputs, position_ids=positions_of(inputs), use_cache=False)
    hidden = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    width = hidden.shape[1]
    for layer, (block, args, kwargs) in enumerate(calls):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        if layer in layers:
            mask = rest["attention_mask"]
            if mask is None:
                mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
            rest["attention_mask"] = mask & ~unread
        new = block(hidden, *args[1:], **rest)
        hidden = (
            torch.where(where[..., None], hidden, new) if layer in layers and not process else new
        )
    return model.get_decoder().norm(hidden)


@pytest.mark.parametrize(("cut", "process"), [(bypass, False), (knock_out, True)])
def test_hiding_is_the_loop_by_hand(foreign, cut, process):
    model, inputs, positions = foreign
    expected = hidden_by_hand(
        model, inputs, {0, 2}, places(model, inputs, positions), process=process
    )
    with cut(model, {0, 2}, positions):
        assert torch.equal(final(model, inputs), expected)


@pytest.mark.parametrize("cut", [skip, bypass])
def test_generate_decodes_what_whole_passes_would(foreign, cut):
    model, inputs, positions = foreign
    n_new, written, options = 6, inputs, {"do_sample": False, "suppress_tokens": [SPEECH]}
    with cut(model, {0, 1, 2}, positions):
        output = model.generate(**inputs, max_new_tokens=n_new, **options)
        for _ in range(n_new):
            with torch.no_grad():
                hidden = final(model, written)
                logits = model.get_output_embeddings()(hidden[:, -1:])
                logits[..., SPEECH] = -torch.inf  # it would stand for audio that isn't there
                tokens = logits.argmax(-1)
            ids = torch.cat([written["input_ids"], tokens], 1)
            mask = torch.cat([written["attention_mask"], torch.ones_like(tokens)], 1)
            written = {**written, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(output, written["input_ids"])
    plain = model.generate(**inputs, max_new_tokens=n_new, **options)
    assert not torch.equal(output, plain)


def test_the_loss_is_that_of_the_answer_alone(foreign):
    model, inputs, _ = foreign
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with torch.no_grad(), skip(model, {1}, "answer"):
        loss = model(**inputs, labels=labels).loss
    with torch.no_grad(), skip(model, {1}, "bos"):
        assert loss.isfinite() and loss != model(**inputs, labels=labels).loss


def test_blocks_are_watched(foreign):
    model, inputs, positions = foreign
    with torch.no_grad(), watch_blocks(model, positions) as change, skip(model, {1}, positions):
        model(**inputs)
    assert [cosine[0].shape for cosine in change.cosine] == [(2,)] * N_LAYERS
    assert change.cosine[1][0].tolist() == pytest.approx([1, 1])
    assert all((angle[0] > 0).all() for layer, angle in enumerate(change.angle) if layer != 1)


@pytest.mark.parametrize("name", HEARING)
def test_seconds_find_their_positions(name):
    model, inputs = FOREIGN[name].build(), prompts(name, waves(0.9, 0.5))
    step = anatomy(model).seconds
    early = places(model, inputs, f"speech:0-{2 * step}").sum(1)
    assert early.tolist() == [2, 2]
    whole = places(model, inputs, "speech").sum(1)
    assert torch.equal(places(model, inputs, "speech:0-60").sum(1), whole)
    # A clip of 0.9 s and the seconds that its positions stand for, but for padded windows.
    if name in {"phi4_multimodal", "gemma4_unified", "qwen2_audio", "qwen3_asr"}:
        assert whole[0] * step == pytest.approx(0.9, abs=step)


def test_a_model_that_only_reads_has_no_speech():
    with (
        pytest.raises(UsageError, match="LlamaForCausalLM hears nothing"),
        skip(FOREIGN["llama"].build(), {1}, "speech"),
    ):
        pass


def test_an_unknown_class_says_what_it_needs():
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    model = BertLMHeadModel(config)
    model.config.model_type = "my_speech_model"
    with pytest.raises(UsageError, match=r"BertLMHeadModel \(my_speech_model\) has no adapter"):
        anatomy(model)


@pytest.mark.parametrize("name", HEARING)
def test_a_prompt_holds_the_clip_between_the_words_of_the_chat(name):
    lm, clips = foreign_listener(name), waves(0.9, 0.5)
    processor = lm.processor
    batch = processor(clips, ["please hold", "one"])
    ids, labels = batch["input_ids"], batch["labels"]
    _, counts = processor.features(clips, 16_000)
    assert (ids == SPEECH).sum(1).tolist() == counts
    for wave, count in zip(clips, counts, strict=True):
        assert count <= processor.positions_of(wave) or name == "voxtral"
    if name not in {"voxtral", "granite_speech"}:
        assert processor.positions_of(clips[0]) <= counts[0] + 4
    turn = processor.tokenizer.convert_tokens_to_ids("<turn>")
    assert processor.end_id == turn
    assert [row[row != -100].tolist() for row in labels] == [
        processor.answer_ids("please hold"),
        processor.answer_ids("one"),
    ]
    assert ids[0, 0] == processor.tokenizer.bos_token_id
    assert processor.decode(ids[0][labels[0] != -100]) == "please hold"
    one, alone = processor(clips[:1]), processor(clips[0])
    assert torch.equal(one["input_ids"], alone["input_ids"])


@pytest.mark.parametrize("name", HEARING)
def test_replay_gives_what_generate_and_the_loss_give(name):
    lm, clips, texts = foreign_listener(name), waves(0.9, 0.5, 0.7), ["please hold", "one", "call"]
    replay = lm.replay(clips, texts, 8)
    written = lm.processor.batch_decode(replay.intact.answers)
    assert written == lm.transcribe(clips, 8)
    for layers in ({0}, {2}, {1, 3}):
        with lm.skip(layers):
            heard = replay.hear(min(layers) + 1)
            assert lm.processor.batch_decode(heard.answers) == lm.transcribe(clips, 8)
            scores = lm.score(clips, texts)
            assert torch.allclose(heard.nll, scores.nll, atol=1e-4)
            assert torch.equal(heard.tokens, scores.tokens)
    inputs = lm.processor(clips[:1], texts[:1])
    with torch.no_grad():
        loss = lm.model(**inputs).loss
    assert lm.score(clips[:1], texts[:1]).nll.item() == pytest.approx(
        loss.item() * len(lm.processor.answer_ids(texts[0])), rel=1e-5
    )


@pytest.mark.parametrize("name", HEARING)
def test_a_patch_is_the_other_run_and_attribution_its_derivative(name):
    lm, texts = foreign_listener(name), ["please hold", "one"]
    clips = waves(0.9, 0.5)
    others = [wave[::-1].copy() for wave in clips]
    clean, entering = lm.score(clips, texts), lm.entering(clips)
    with lm.patch({0: entering[0]}):
        assert torch.allclose(lm.score(others, texts).log_probs, clean.log_probs, atol=1e-5)
    replay = lm.replay(others, texts, 8)
    with lm.patch({2: entering[2]}):
        heard = replay.hear(2)
        assert lm.processor.batch_decode(heard.answers) == lm.transcribe(others, 8)
        assert torch.allclose(heard.nll, lm.score(others, texts).nll, atol=1e-4)
    estimate, corrupted = lm.attribution(clips, others, texts), lm.entering(others)

    def part_of_the_way(step):
        pairs = zip(corrupted[3], entering[3], strict=True)
        with lm.patch({3: [a + step * (b - a) for a, b in pairs]}):
            return lm.score(others, texts).nll

    slope = (part_of_the_way(0.01) - part_of_the_way(-0.01)) / 0.02
    assert torch.allclose(slope, estimate[3], rtol=0.05, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", HEARING)
def test_what_a_study_holds_is_counted_whatever_the_blocks_are(name):
    lm = foreign_listener(name)
    inputs, cache = lm.processor(waves(0.9)), DynamicCache()
    lm.model(**inputs, past_key_values=cache, use_cache=True)
    keys_and_values = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    positions = inputs["input_ids"].shape[1]
    residuals = (N_LAYERS + 1) * positions * lm.model.config.get_text_config().hidden_size * 4
    assert 2 * residuals + 3 * keys_and_values < study_bytes(lm.model, positions, 0)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A speech LLM as the hub would give it, and clips."""
    folder = tmp_path_factory.mktemp("hub")
    lm = foreign_listener("qwen3_asr")
    for part in (lm.model, lm.processor.feature_extractor, lm.processor.tokenizer):
        part.save_pretrained(folder / "tiny-asr")
    tiny_manifest(folder / "data.jsonl")
    return folder


def test_a_study_of_a_model_from_the_hub(hub_folder, tmp_path, capsys):
    words = ["--model", str(hub_folder / "tiny-asr"), "--data", str(hub_folder / "data.jsonl")]
    options = ["--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "run")]
    ablate.main(["--skip-layers", *words, *options])
    printed = capsys.readouterr()
    assert "billion parameters" in printed.err and "report:" in printed.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [layer["layer"] for layer in results["layers"]] == [0, 1, 2, 3]
    about = results["checkpoint"]
    assert (about["name"], about["n_layers"], about["front"]) == ("tiny-asr", 4, "qwen3_asr")
    assert about["token_rate_hz"] == pytest.approx(13)
    assert "speech positions a second" in (tmp_path / "run" / "report.html").read_text()
    assert not results["gate"]["passed"]  # random weights hear nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such"], "no config can be read by that name, on the hub or on disk"),
        (["--model", "{}/tiny-asr", "--checkpoint", "mel-mini"], "name one of them"),
        (["--model", "{}/llama"], "llama hears nothing; --copy-text studies it on text"),
        (
            ["--model", str(find_checkpoint("mel-mini"))],
            "it was trained here; name it by --checkpoint",
        ),
        (["--device-map", "auto"], "--device-map goes with --model"),
        (["--model", "{}/tiny-asr", "--device-map", "auto", "--device", "cpu"], "name one of them"),
    ],
)
def test_bad_input_is_one_line(hub_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    FOREIGN["llama"].build().save_pretrained(hub_folder / "llama")
    words = [word.format(hub_folder) for word in words]
    with pytest.raises(UsageError, match=message) as caught:
        ablate.main(["--skip-layers", *words, "--out", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def _half_of(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])


def _without_a_tensor(weights):
    tensors = load_file(weights)
    tensors.pop("model.language_model.layers.1.input_layernorm.weight")
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_half_of, "Error while deserializing header"),
        (_without_a_tensor, r"1 tensors are missing: model\.language_model\.layers\.1\.input"),
    ],
)
def test_damaged_weights_are_refused(hub_folder, tmp_path, damage, message):
    """Those that are missing would be drawn at random, and measured."""
    folder = tmp_path / "damaged"
    shutil.copytree(hub_folder / "tiny-asr", folder)
    damage(folder / "model.safetensors")
    with pytest.raises(UsageError, match=f"--model {folder}: {message}"):
        melprobe.load_model(str(folder), device="cpu", dtype=torch.float32)


def test_a_chat_template_that_takes_words_alone_gets_the_audio_token_among_them():
    chat = tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    extractor = FOREIGN["phi4_multimodal"].extractor()
    speech = anatomy(FOREIGN["phi4_multimodal"].build())
    processor = OtherProcessor(extractor, chat, LISTENING["phi4_multimodal"], speech)
    assert processor.before == "<user>"
    assert processor.after == "Transcribe the audio clip into text.<turn><assistant>"
    assert processor.end_id == chat.convert_tokens_to_ids("<turn>")


def test_a_clip_that_the_extractor_would_cut_off_is_refused():
    lm = foreign_listener("qwen2_audio")  # its extractor's window is 1 s here
    with pytest.raises(UsageError, match=r"lasts 1\.50 s, and this model hears 1 s"):
        lm.transcribe(waves(0.5, 1.5))


def test_the_audio_token_must_be_among_the_tokenizers():
    small = tokenizer()
    with pytest.raises(UsageError, match="tokenizer has no token 99, its config's for audio"):
        OtherProcessor(None, small, LISTENING["qwen3_asr"], Anatomy(99, 0.1))


@torch.no_grad()
def test_residuals_are_captured(foreign):
    model, inputs, positions = foreign
    passes = []
    with capture(model, range(N_LAYERS + 1), positions, take=passes.append), noting(model) as calls:
        model(**inputs)
        with skip(model, {1}, positions):
            model(**inputs)
    where = places(model, inputs, positions)
    for layer, (_, args, kwargs) in enumerate(calls[:N_LAYERS]):
        hidden = args[0] if args else kwargs["hidden_states"]
        assert torch.equal(passes[0].h(layer), hidden[where])
    assert torch.equal(passes[1].h(2), passes[1].h(1))
    assert not torch.equal(passes[0].h(2), passes[0].h(1))
