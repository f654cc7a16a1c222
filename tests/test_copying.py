"""The text-copying control: a model is given the words of clips, and cut as it is when it hears."""

import json
import re

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

import melprobe
from melprobe import ablate
from melprobe.analysis.question import Question
from melprobe.corpus.manifest import Utterance, write_manifest
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks
from melprobe.listener import Listener
from melprobe.model.chat import ANSWER, EXAMPLES, text_prompts
from melprobe.model.config import token_ids_only
from melprobe.report.html import render
from tests.foreign import FOREIGN, HEARING, foreign_listener, scaled, tokenizer
from tests.tiny import N_LAYERS, TEXTS, WORDS, tiny_listener

LIMIT = 12
OTHERS = [*TEXTS[1:], TEXTS[0]]


def plain_listener(chat=True):
    """A small Llama that only reads, in float32."""
    torch.manual_seed(0)
    model, processor = scaled(FOREIGN["llama"].build()), text_prompts(tokenizer(chat))
    model.generation_config = token_ids_only(model.generation_config)
    model.generation_config.eos_token_id = processor.end_id
    return Listener(model, processor)


@pytest.fixture(scope="module", params=["mel_llm", "llama"])
def reader(request):
    return tiny_listener().reading() if request.param == "mel_llm" else plain_listener()


def same(lm, heard):
    scores = lm.score(OTHERS, TEXTS)
    assert torch.allclose(heard.nll, scores.nll, atol=1e-4)
    assert torch.equal(heard.tokens, scores.tokens)
    assert lm.processor.batch_decode(heard.answers) == lm.transcribe(OTHERS, LIMIT)


@pytest.mark.parametrize("positions", ["bos", "prompt", "answer", "text", "all"])
def test_replay_of_texts_is_the_plain_model_under_the_same_hooks(reader, positions):
    replay = reader.replay(OTHERS, TEXTS, LIMIT)
    same(reader, replay.intact)
    for layer in range(N_LAYERS):
        with reader.skip({layer}, positions):
            same(reader, replay.hear(layer + 1))
    for hide in (reader.knock_out, reader.bypass):
        with hide({1, 3}, positions):
            same(reader, replay.hear(1))
    same(reader, replay.hear())


@pytest.mark.parametrize("name", HEARING)
def test_other_speech_llms_read_with_their_prompt_without_audio(name):
    lm = foreign_listener(name)
    reader, speech = lm.reading(), lm.processor.audio_token_id
    (ids,) = reader.processor("please hold")["input_ids"].tolist()
    before, after = lm.processor.around
    words = lm.processor.tokenizer("please hold", add_special_tokens=False)["input_ids"]
    assert ids == [*before, *words, *after] == lm.processor.text_prompt("please hold")
    assert speech not in ids
    replay = reader.replay(OTHERS, TEXTS, LIMIT)
    with reader.skip({1}, "prompt"):
        same(reader, replay.hear(2))


@torch.no_grad()
def test_a_skip_at_the_prompt_is_a_loop_by_hand():
    """Of a plain Llama: its own blocks in turn, from the rows of the ids alone."""
    lm = plain_listener()
    text, answer, skipped = "the new number", "please hold", {1, 2}
    prompt = lm.processor.text_prompt(text)
    decoder = lm.model.get_decoder()

    def logits(ids):
        """(S, V)"""
        place = torch.arange(len(ids))[None]
        hidden = decoder.embed_tokens(torch.tensor([ids]))
        turns = decoder.rotary_emb(hidden, place)
        for number, block in enumerate(decoder_blocks(lm.model)):
            new = block(hidden, position_embeddings=turns, position_ids=place)
            if number in skipped:  # all of the prompt but the first token
                new[:, 1 : len(prompt)] = hidden[:, 1 : len(prompt)]
            hidden = new
        return lm.model.lm_head(decoder.norm(hidden))[0]

    said = lm.processor.answer_ids(answer)
    chances = logits([*prompt, *said]).log_softmax(-1)[len(prompt) - 1 : -1]
    nll = -chances[range(len(said)), said].sum()
    written = list(prompt)
    while len(written) < len(prompt) + LIMIT and written[-1] != lm.processor.end_id:
        written.append(int(logits(written)[-1].argmax()))
    with lm.skip(skipped, "prompt"):
        assert torch.allclose(lm.score([text], [answer]).nll, nll, atol=1e-5)
        assert lm.transcribe([text], LIMIT) == [lm.processor.decode(written[len(prompt) :])]
    assert not torch.allclose(lm.score([text], [answer]).nll, nll, atol=1e-2)


@pytest.mark.parametrize("positions", ["bos", "prompt", "answer", "text", "all"])
def test_the_last_block_is_unread_just_where_its_skip_is_exactly_free(reader, positions):
    plain = reader.score(OTHERS, TEXTS).nll
    with reader.skip({N_LAYERS - 1}, positions):
        free = torch.equal(reader.score(OTHERS, TEXTS).nll, plain)
    question = Question("skip", positions, "3", copy_text=True)
    found = question.unread_block(reader.processor, N_LAYERS, OTHERS)
    assert free is (found == str(N_LAYERS - 1)) is (positions == "bos")


def test_a_chat_shows_copies_and_asks_for_one_more():
    prompts = text_prompts(tokenizer())
    words = prompts.tokenizer.convert_ids_to_tokens(prompts.text_prompt("please hold"))
    assert words[:2] == ["<s>", "<user>"] and words[-1] == "<assistant>"
    assert words.count("<user>") == len(EXAMPLES) + 1 and words[-4:-2] == ["please", "hold"]
    assert prompts.end_id == prompts.tokenizer.convert_tokens_to_ids("<turn>")
    refusing = tokenizer()
    refusing.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UsageError, match=r"refuses to ask for a copy \(no users here\)"):
        text_prompts(refusing)
    refusing.chat_template = "<s>{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(UsageError, match="gives what the user says 0 times"):
        text_prompts(refusing)


def byte_level(*merges):
    """A tokenizer as GPT-2's, of single bytes but for pairs that it merges."""
    alphabet = sorted(ByteLevel.alphabet())
    known = [*alphabet, *map("".join, merges)]
    made = Tokenizer(BPE({word: number for number, word in enumerate(known)}, list(merges)))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=alphabet[0])


def test_the_text_stands_behind_the_same_tokens_as_those_that_are_shown():
    """It is encoded apart from what the user says before it; they are encoded with it."""
    chatting = byte_level(("Ċ", "Ċ"), (".", "Ċ"))
    chatting.chat_template = (
        "{% for said in messages %}{{ said.role }} {{ said.content }} {% endfor %}assistant "
    )
    asked = text_prompts(chatting).text_prompt(EXAMPLES[0])
    assert asked == chatting(chatting.decode(asked), add_special_tokens=False)["input_ids"]


def test_without_a_chat_lines_show_it_and_the_end_of_a_line_ends_a_copy():
    chatless = byte_level()
    prompts = text_prompts(chatless)
    shown = "".join(f"Text:\n{text}\nCopy:\n{text}\n\n" for text in EXAMPLES)
    asked = chatless.decode(prompts.text_prompt("please hold"))
    assert asked == f"{shown}Text:\nplease hold\nCopy:\n"
    assert chatless.decode(prompts.end_id) == "\n"
    without_lines = text_prompts(tokenizer(chat=False))
    assert without_lines.end_id == without_lines.tokenizer.eos_token_id
    assert without_lines.text_prompt("one")[0] == without_lines.tokenizer.bos_token_id


def test_a_base_of_ours_is_asked_as_it_was_taught():
    ours = tiny_listener().processor.tokenizer
    prompts = text_prompts(ours)
    words = ours.convert_ids_to_tokens(prompts.text_prompt("please hold"))
    assert (words[0], words[-1]) == (ours.bos_token, ANSWER)
    assert ours.decode(prompts.text_prompt("please hold")[1:-1]).strip() == "please hold"


def test_what_is_given_must_be_what_the_model_takes(lm, clips):
    reader = lm.reading()
    assert reader.reading().transcribe(TEXTS, LIMIT) == reader.transcribe(TEXTS, LIMIT)
    with pytest.raises(TypeError, match="this model reads: give texts, not ndarray"):
        reader.transcribe(clips)
    with pytest.raises(TypeError, match="this model hears: give waves"):
        lm.transcribe(TEXTS)


@pytest.fixture(scope="module")
def silent(folder):
    """A checkpoint, a plain model, and a manifest of which no audio is there."""
    said = [f"{WORDS[i]} {WORDS[i + 1]} please" for i in range(6)]
    said += ["The, press PLEASE!", "..."]
    write_manifest(
        folder / "silent.jsonl",
        [
            Utterance(f"{i}.wav", folder / f"{i}.wav", text, 0.5 + 0.1 * i, f"speaker {i}")
            for i, text in enumerate(said)
        ],
    )
    write_manifest(
        folder / "wordless.jsonl", [Utterance("a.wav", folder / "a.wav", "...", 1.0, "")]
    )
    lm = plain_listener()
    for part in (lm.model, lm.processor.tokenizer):
        part.save_pretrained(folder / "plain")
    return folder


def arguments(folder, *words):
    data = () if "--data" in words else ("--data", str(folder / "silent.jsonl"))
    return [*words, *data, "--dtype", "float32", "--device", "cpu"]


MODELS = {"ours": ("--checkpoint", "{}/model"), "plain": ("--model", "{}/plain")}


def visible(page):
    """What a reader of the report sees or hears read out."""
    page = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    said = re.findall(r"(?:aria-label|title)=\"([^\"]*)\"", page)
    return " ".join([re.sub(r"<[^>]*>", " ", page), *said])


HEARING_WORDS = re.compile(
    r"audio|\bdeaf|\blisten|\bpatch|\bhear|\bspeakers?\b|\brecording|\bclip’s|\butterance"
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "words",
    [
        ["--skip-layers"],
        ["--skip-layers", "1,2"],
        ["--skip-layers", "suffixes", "--positions", "text"],
        ["--skip-layers", "windows:2"],
        ["--knockout", "--positions", "bos", "--readers", "answer"],
        ["--bypass-layers", "--lengths", "0-2"],
        ["--ablate-mlp", "--by", "mean"],
        ["--ablate-heads", "--positions", "all"],
    ],
    ids=" ".join,
)
def test_a_study_of_texts_needs_no_audio_and_speaks_of_none(silent, tmp_path, model, words):
    which = [word.format(silent) for word in MODELS[model]]
    ablate.main(arguments(silent, "--copy-text", *words, *which, "--out", str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["question"]["copy_text"] and not (tmp_path / "audio").exists()
    assert results["data"]["seconds"] is results["baseline"]["rtfx"] is None
    assert results["data"]["n_speakers"] == 0
    assert results["data"]["left_out"] == ["6.wav: says what 0.wav says", "7.wav: no words to copy"]
    assert "swapping the text costs" in results["gate"]["reason"]
    about = results["checkpoint"]["token_rate_hz"]
    assert about is None if model == "plain" else about == 12.5
    passed = {"passed": True, "nll_intact": 1.0, "nll_swapped": 3.0, "nll_gap_ci": (1.0, 2.0)}
    hurt = {"damage": 0.1, "damage_ci": (0.06, 0.2), "delta_nll": 0.2, "delta_nll_ci": (0.1, 0.3)}
    choice = {"n_utterances": 3, "sets_tried": 4, "not_offered": []}
    layers = [layer | hurt for layer in results["layers"]]
    for gate in (results["gate"], results["gate"] | passed):  # random weights don't pass it
        (tmp_path / "results.json").write_text(
            json.dumps(results | {"gate": gate, "layers": layers, "choice": choice})
        )
        page = render(tmp_path).read_text()
        told = visible(page.replace(results["gate"]["reason"], ""))
        assert "eading gate" in told and not HEARING_WORDS.findall(told)
        assert "is reading another text" in told


def test_a_plain_model_may_be_of_another_class(silent, tmp_path):
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    which = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"))
    ablate.main(arguments(silent, "--copy-text", "--knockout", *which))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [layer["layer"] for layer in results["layers"]] == [0, 1]


def test_what_is_read_and_written_is_the_transcript(silent, tmp_path):
    which = [word.format(silent) for word in MODELS["ours"]]
    ablate.main(arguments(silent, "--copy-text", "--skip-layers", *which, "--out", str(tmp_path)))
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert (rows.speaker == "").all() and set(rows[rows.layer != ""].positions) == {"prompt"}
    reader = melprobe.load(silent / "model", device="cpu", dtype=torch.float32).reading()
    for layer in range(N_LAYERS):
        with reader.skip({layer}, "prompt"):
            cut = rows[rows.layer == str(layer)]
            texts = cut.reference.tolist()
            assert cut.nll.tolist() == pytest.approx(
                reader.score(texts, texts).nll.tolist(), rel=1e-4
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--positions", "speech"], "--copy-text --positions speech: where text is read"),
        (["--positions", "speech:0-1"], "--copy-text --positions speech:0-1: where text is read"),
        (["--positions", "vowels"], "there are bos, prompt, speech"),
        (["--noise", "10"], "--copy-text --noise: this is for clips"),
        (["--heal", "3"], "--copy-text --heal: this is for clips"),
        (["--lengths", "7-9"], "no clip lasts so long"),
        (["--data", "{}/wordless.jsonl"], "a.wav: no words to copy"),
        (["--model", "{}/plain", "--checkpoint", "mel-mini"], "name one of them"),
        (["--model", "{}/plain", "--without-lora"], "not allowed with argument"),
        (["--model", "{}/nowhere"], "no config can be read by that name"),
    ],
)
def test_bad_input_is_one_line(silent, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(silent, tmp_path, ["--skip-layers", "--copy-text", *words], message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "--copy-text"], "--copy-text --patch: this is for clips"),
        (["--ablate-mlp", "--by", "resample", "--copy-text"], "--copy-text --by resample: this"),
        (["--knockout", "--readers", "speech", "--copy-text"], "--copy-text --readers speech"),
        (["--knockout", "--beyond", "1", "--copy-text"], "--copy-text --beyond: this is for"),
        (["--knockout", "--positions", "all", "--copy-text"], "nothing to hide them from"),
        (["--without-lora", "--model", "{}/plain", "--copy-text"], "no LoRA apart from its"),
        (["--skip-layers", "--model", "{}/plain"], "llama hears nothing; --copy-text studies it"),
    ],
)
def test_what_texts_or_plain_models_cannot_answer_is_one_line(silent, tmp_path, words, message):
    refused(silent, tmp_path, words, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2), "has no list of blocks named"),
        (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1), "has no attention in"),
    ],
)
def test_a_model_without_blocks_to_cut_is_one_line(silent, tmp_path, config, message):
    place = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    refused(silent, tmp_path, ["--skip-layers", "--copy-text", "--model", str(place)], message)


def refused(folder, tmp_path, words, message):
    words = [word.format(folder) for word in words]
    if not {"--model", "--checkpoint"} & set(words):
        words += ["--checkpoint", str(folder / "model")]
    with pytest.raises(UsageError) as error:
        ablate.main(arguments(folder, *words, "--out", str(tmp_path / "run")))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_study_names_the_mode(silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    which = [word.format(silent) for word in MODELS["ours"]]
    ablate.main(arguments(silent, "--copy-text", "--skip-layers", "2", *which))
    (run,) = (tmp_path / "reports").iterdir()
    assert "copy-text-skip-prompt-layers-2-n30" in run.name
