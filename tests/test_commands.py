"""The layer study as a user runs it; good input and bad."""

import json
import math
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import melprobe
from melprobe import ablate, evaluate, transcribe
from melprobe.analysis.protocol import answer_limit, noisy
from melprobe.analysis.question import Question
from melprobe.analysis.study import LayerStudy, clip_bytes, swap_partners
from melprobe.analysis.sweep import StudyBatch
from melprobe.analysis.wer import count_errors
from melprobe.audio.augment import add_noise
from melprobe.audio.load import BadAudio, load_utterance
from melprobe.corpus.manifest import Utterance, read_manifest, write_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.hooks.parts import Part, Target, in_place, watch_means, watch_parts
from melprobe.model.memory import peak_bytes
from melprobe.report.html import render
from melprobe.report.reading import EACH_BLOCK
from tests.tiny import N_CLIPS as N
from tests.tiny import N_LAYERS, WORDS, tiny_listener, waves


@pytest.fixture(scope="module")
def sweep(folder):
    ablate.main(arguments(folder, "--skip-layers", "--out", str(folder / "run")))
    return folder / "run"


def arguments(folder, *words):
    return [
        *words,
        *("--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")),
        *("--dtype", "float32", "--device", "cpu"),
    ]


def results(run):
    return json.loads((run / "results.json").read_text())


def test_the_sweep_has_a_row_for_each_condition_and_utterance(sweep):
    rows = pd.read_parquet(sweep / "rows.parquet")
    assert len(rows) == N * (2 + N_LAYERS)
    assert rows.groupby(["condition", "layer"]).utterance.nunique().eq(N).all()
    intact = rows[rows.condition == "intact"]
    assert (intact.kl == 0).all()
    for row in rows.itertuples():
        errors = count_errors(row.reference, row.hypothesis)
        assert row.substitutions == errors.substitutions and row.insertions == errors.insertions


def test_scores_follow_from_the_rows(sweep):
    rows, found = pd.read_parquet(sweep / "rows.parquet"), results(sweep)
    nll = rows.groupby(["condition", "layer"]).nll.sum()
    tokens = rows[rows.condition == "intact"].answer_tokens.sum()
    intact, swapped = nll["intact", ""], nll["swapped", ""]
    assert found["gate"]["nll_intact"] == pytest.approx(intact / tokens)
    for layer in found["layers"]:
        lost = nll["skip", str(layer["layer"])] - intact
        assert layer["delta_nll"] == pytest.approx(lost / tokens)
        low, high = layer["delta_nll_ci"]
        assert low <= layer["delta_nll"] <= high
        if swapped > intact:
            assert layer["damage"] == pytest.approx(lost / (swapped - intact))


def test_the_last_block_at_speech_positions_costs_exactly_nothing_and_says_why(sweep):
    *others, last = results(sweep)["layers"]
    assert last["delta_nll"] == 0 and last["kl"] == 0 and last["delta_wer"] == 0
    assert last["zero_by_construction"] and not any(o["zero_by_construction"] for o in others)
    assert all(other["kl"] > 0 for other in others)


@pytest.mark.parametrize(
    ("positions", "after", "unread"),
    [
        ("speech", "go", True),
        ("speech", "", False),
        ("prompt", "", True),
        ("prompt", "go", False),
        ("speech:0-0.4", "", True),
        ("speech:0.4-9", "", False),
        *[("bos", after, True) for after in ("", "go")],
        *[(kind, "go", False) for kind in ("answer", "text", "all")],
    ],
)
def test_the_last_block_is_unread_just_where_its_skip_is_exactly_free(positions, after, unread):
    lm, texts = tiny_listener(), ["please hold", "one"]
    lm.processor.before, lm.processor.after = "new", after
    clips = waves(0.6, 0.8)
    plain = lm.score(clips, texts).nll
    with lm.skip({N_LAYERS - 1}, positions):
        free = torch.equal(lm.score(clips, texts).nll, plain)
    assert free is unread
    question = Question("skip", positions, "3")
    found = question.unread_block(lm.processor, N_LAYERS, clips)
    assert found == (str(N_LAYERS - 1) if unread else None)
    assert question._replace(cut="bypass").unread_block(lm.processor, N_LAYERS, clips) is None


def test_an_untrained_model_does_not_pass_the_listening_gate(sweep):
    assert results(sweep)["gate"]["passed"] is False
    assert (sweep / "report.html").stat().st_size < 8e6


def test_a_stopped_study_goes_on_and_ends_the_same(folder, sweep, monkeypatch):
    out = folder / "resumed" / sweep.name  # rows carry the run's name
    command = arguments(folder, "--skip-layers", "--out", str(out))
    written = []
    add = ablate.RowStore.add

    def stop_after_three(store, rows):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(add(store, rows))

    with monkeypatch.context() as patch:
        patch.setattr(ablate.RowStore, "add", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            ablate.main(command)
    ablate.main(command)
    same = ["condition", "layer", "utterance", "nll", "kl", "hypothesis"]
    whole, resumed = (pd.read_parquet(run / "rows.parquet")[same] for run in (sweep, out))
    pd.testing.assert_frame_equal(whole, resumed)


def test_a_finished_study_is_not_computed_again(folder, sweep, monkeypatch):
    monkeypatch.setattr(ablate.RowStore, "add", lambda *_: pytest.fail("computed again"))
    ablate.main(arguments(folder, "--skip-layers", "--out", str(sweep)))


def test_the_report_is_rebuilt_byte_for_byte(sweep):
    first = (sweep / "report.html").read_bytes()
    assert render(sweep).read_bytes() == first


def test_a_set_of_layers_is_one_condition(folder):
    ablate.main(arguments(folder, "--skip-layers", "0,2-3", "--out", str(folder / "set")))
    (layer,) = results(folder / "set")["layers"]
    assert layer["layer"] == "0,2-3" and layer["block_influence"] is None


@pytest.mark.parametrize(
    ("option", "cut", "says"),
    [
        ("--knockout", "knock-out", "knocked out"),
        ("--bypass-layers", "bypass", "bypassed"),
        ("--without-lora", "without-lora", "run without LoRA"),
    ],
)
def test_other_cuts_have_rows_scores_and_words_of_their_own(folder, option, cut, says):
    run = folder / cut
    ablate.main(arguments(folder, option, "--out", str(run)))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    positions = "all" if cut == "without-lora" else "speech"
    expected = {"cut": cut, "positions": positions, "layers": "each block in turn"}
    rest = {"readers": "", "beyond": 0.0, "by": "", "source_noise_db": 0.0, "copy_text": False}
    assert found["question"] == {**rest, **expected}
    assert set(rows.condition) == {"intact", "swapped", cut}
    last = found["layers"][-1]  # it is read there by what comes after
    assert last["kl"] > 0 and not last["zero_by_construction"]
    page = (run / "report.html").read_text()
    assert f"each block is {says} in turn" in page and "skipped" not in page


def test_a_study_says_what_the_model_does_under_the_same_cut(folder, sweep):
    lm = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    utterances = read_manifest(folder / "data.jsonl")
    clips, texts = [load_utterance(u) for u in utterances], [u.text for u in utterances]
    rows = pd.read_parquet(sweep / "rows.parquet").set_index(["layer", "utterance"])
    limit = answer_limit(lm, utterances)
    for layer in range(N_LAYERS):
        with lm.skip({layer}):
            answers, scores = lm.transcribe(clips, limit), lm.score(clips, texts)
        row = rows.loc[str(layer)].loc[[u.id for u in utterances]]
        assert row.hypothesis.tolist() == answers
        assert row.nll.tolist() == pytest.approx(scores.nll.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skip-layers", "--knockout"], "not allowed with argument"),
        (["--without-lora", "--positions", "vowels"], "there are bos, prompt, speech"),
        (["--skip-layers", "2,9"], "layers 9: this model has blocks 0 to 3"),
        (["--skip-layers", ""], "is not a number"),
        (["--skip-layers", "windows:9"], "take windows:N with N from 2 to 3"),
        (["--skip-layers", "windows"], "is not a number"),
        (["--skip-layers", "picks:1"], "take picks:N with N from 2 to 3"),
        (["--skip-layers", "greedy", "--limit", "3"], "takes half of the clips, and there are 3"),
        (["--skip-layers", "--positions", "vowels"], "there are bos, prompt, speech"),
        (["--skip-layers", "--positions", "speech:2-1"], "give seconds from and to"),
        (["--skip-layers", "--positions", "speech:60-70"], "the longest clip lasts"),
        (
            ["--skip-layers", "--positions", "speech:0.29-0.36"],
            "no patch of any clip",
        ),
        (["--skip-layers", "--positions", ""], "positions ''"),
        (["--skip-layers", "--readers", "text"], "go with --knockout"),
        (["--knockout", "--readers", "vowels"], "there are bos, prompt, speech"),
        (["--knockout", "--readers", "bos"], "nothing to hide them from"),
        (["--knockout", "--beyond", "1"], "with --positions speech --readers speech"),
        (["--knockout", "--readers", "speech", "--beyond", "-1"], "--beyond -1: give seconds"),
        (["--knockout", "--readers", "speech", "--beyond", "nan"], "--beyond nan: give seconds"),
        (["--knockout", "--readers", "speech", "--beyond", "9"], "no clip has patches so far"),
        (
            ["--knockout", "--positions", "speech:0.5-1", "--readers", "speech:0-0.5"],
            "nothing to hide them from",
        ),
        (["--skip-layers", "--noise", "nan"], "--noise nan: give decibels"),
        (["--skip-layers", "--noise", "1e308"], "--noise 1e+308: give decibels from -100 to 100"),
        (["--patch", "--by", "noise:-300"], "--patch --by noise:-300: give decibels from -100"),
        (["--skip-layers", "--lengths", "2"], "--lengths 2: give seconds from and to"),
        (["--skip-layers", "--lengths", "7-9"], "no clip lasts so long; they last 0.40 to 0.90"),
        (["--skip-layers", "--by", "mean"], "--by goes with --ablate-attention"),
        (["--ablate-heads", "greedy"], "heads go one by one; take blocks, such as 3,5-8"),
        (["--ablate-heads", "windows:2"], "heads go one by one"),
        (["--ablate-heads", "1.1"], "'1.1' is not a number"),
        (["--ablate-heads", "4"], "layers 4: this model has blocks 0 to 3"),
        (["--ablate-mlp", "--by", "median"], "take zero, mean or resample"),
        (["--skip-layers", "--memory", "0"], "--memory 0: give megabytes"),
        (["--patch", "--by", "noise"], "take resample (another clip) or noise:DB"),
        (["--patch", "--by", "zero"], "take resample (another clip) or noise:DB"),
        (["--patch", "--positions", "all"], "two runs answer with other words"),
        (["--ablate-mlp", "--by", "resample", "--positions", "text"], "another clip's answer"),
        (["--knockout", "--positions", "all"], "nothing to hide them from"),
        (["--knockout", "--positions", "text"], "nothing to hide them from"),
        (["--skip-layers", "--checkpoint", "mel-maxi"], "no checkpoint 'mel-maxi'; there is"),
        (["--skip-layers", "--data", "nowhere/test"], "nowhere/test"),
        (["--skip-layers", "--limit", "-1"], "--limit -1"),
        (["--skip-layers", "--seed", "-1"], "--seed -1"),
        (["--skip-layers", "--device", "abacus"], "device 'abacus': take cpu, cuda"),
        (
            [],
            "--ablate-mlp --ablate-heads --patch --without-lora is required",
        ),
    ],
)
def test_bad_input_to_ablate_is_one_line(folder, words, message):
    command = arguments(folder)
    for flag in ("--checkpoint", "--data", "--device"):
        if flag in words:
            at = command.index(flag)
            del command[at : at + 2]
    with pytest.raises(UsageError) as error:
        ablate.main([*words, *command, "--out", str(folder / "bad")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "bad").exists()


def test_what_is_no_folder_of_a_mel_llm_is_named(folder):
    command = ["--skip-layers", "--data", str(folder / "data.jsonl"), "--checkpoint"]
    with pytest.raises(UsageError, match=r"base/config.json: this is a llama model, not a Mel-LLM"):
        ablate.main([*command, str(folder / "base")])
    (folder / "mine").write_text("results")
    with pytest.raises(UsageError, match=r"--out .*mine: this is a file; name a folder"):
        ablate.main(arguments(folder, "--skip-layers", "--out", str(folder / "mine")))


def test_other_settings_in_the_same_folder_are_refused(folder, sweep):
    with pytest.raises(UsageError, match="positions"):
        ablate.main(arguments(folder, "--skip-layers", "--positions", "text", "--out", str(sweep)))


def test_bad_audio_is_named_or_left_out_and_listed(folder, capsys):
    broken = folder / "broken"
    shutil.copytree(
        folder, broken, ignore=shutil.ignore_patterns("run", "set", "resumed", "broken")
    )
    (broken / "2.flac").write_bytes(b"this is no audio")
    command = arguments(broken, "--skip-layers", "1", "--out", str(broken / "run"))
    with pytest.raises(UsageError, match=r"data.jsonl:3: .*2.flac: not audio"):
        ablate.main(command)
    ablate.main([*command, "--on-bad-audio", "skip"])
    found = results(broken / "run")
    assert found["n_utterances"] == N - 1
    (reason,) = found["data"]["left_out"]
    assert "2.flac" in reason and "not audio" in reason
    assert "2.flac" in (broken / "run" / "report.html").read_text()


def test_swapped_clips_say_something_else_and_are_of_like_length(folder):
    utterances = [
        Utterance(str(i), folder, text, d)
        for i, (text, d) in enumerate([("one", 1.0), ("One!", 1.01), ("two", 1.2), ("three", 9.0)])
    ]
    assert swap_partners(utterances) == [2, 2, 1, 2]
    with pytest.raises(UsageError, match="needs two clips with different words"):
        swap_partners(utterances[:2])


@pytest.mark.parametrize("texts", [["one"], ["one", "One!"]])
def test_a_refused_study_leaves_no_folder(folder, tmp_path, texts):
    clips = read_manifest(folder / "data.jsonl")
    said = [replace(u, text=text) for u, text in zip(clips, texts, strict=False)]
    write_manifest(tmp_path / "data.jsonl", said)
    command = ["--skip-layers", "--checkpoint", str(folder / "model"), "--device", "cpu"]
    command += ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "a" / "run")]
    with pytest.raises(UsageError, match="needs two clips with different words"):
        ablate.main(command)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("layers", "sets"),
    [
        ("windows:3", ["0-2", "1-3"]),
        ("prefixes", ["0", "0-1", "0-2", "0-3"]),
        ("suffixes", ["3", "2-3", "1-3", "0-3"]),
    ],
)
def test_series_of_sets_are_cut_in_turn(folder, layers, sets):
    run = folder / layers.replace(":", "")
    ablate.main(arguments(folder, "--skip-layers", layers, "--out", str(run)))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    assert [str(layer["layer"]) for layer in found["layers"]] == sets
    assert set(rows[rows.condition == "skip"].layer) == set(sets)
    page = (run / "report.html").read_text()
    assert ("in turn" if layers == "windows:3" else "and so on") in page


@pytest.mark.parametrize(
    ("option", "by", "says"),
    [
        ("--ablate-attention", "zero", "each block is run without attention in turn"),
        ("--ablate-mlp", "mean", "gives way to its mean over all that is given"),
        ("--ablate-attention", "resample", "gives way to what it adds to another clip"),
        ("--ablate-heads", "zero", "each attention head is left out in turn"),
        ("--ablate-heads", "mean", "gives way to its mean over all that is given"),
    ],
)
def test_parts_of_blocks_give_way(folder, option, by, says):
    run = folder / f"{option}{by}".strip("-")
    words = [option, *(["--by", by] if by != "zero" else []), "--out", str(run)]
    ablate.main(arguments(folder, *words))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    name = option.removeprefix("--ablate-").removesuffix("s")
    assert found["question"]["cut"] == f"no-{name}" and found["question"]["by"] == by
    n_heads = 4 if name == "head" else 1
    others, last = found["layers"][:-n_heads], found["layers"][-n_heads:]
    assert len(others) == n_heads * (N_LAYERS - 1) and all(layer["kl"] > 0 for layer in others)
    assert all(layer["kl"] == 0 and layer["zero_by_construction"] for layer in last)
    assert says in (run / "report.html").read_text()
    # Row for row what the library gives.
    utterances = read_manifest(folder / "data.jsonl")
    clips, texts = [load_utterance(u) for u in utterances], [u.text for u in utterances]
    lm = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    part, values = Part(1, name, 0 if name == "head" else None), None
    if by == "mean":
        with watch_means(lm.model, [part]) as means:
            lm.score(clips, texts)
        values = means.values()
    if by == "resample":
        with watch_parts(lm.model, [part]) as seen:
            lm.model(**lm.processor([clips[i] for i in swap_partners(utterances)]))
        prompts = lm.processor(clips, [plain_text(text) for text in texts])["input_ids"]
        values = {part: in_place(seen[part], prompts == lm.processor.audio_token_id)}
    with lm.ablate([part], "speech", values):
        nll = lm.score(clips, texts).nll
    label = "1.0" if name == "head" else "1"
    row = rows[rows.layer == label].set_index("utterance").loc[[u.id for u in utterances]]
    assert row.nll.tolist() == pytest.approx(nll.tolist(), rel=1e-4)


def test_a_profile_can_be_taken_in_noise_and_at_a_length(folder):
    run = folder / "noise"
    words = ["--skip-layers", "1", "--noise", "5", "--lengths", "0.5-0.8", "--out", str(run)]
    ablate.main(arguments(folder, *words))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    chosen = [u for u in read_manifest(folder / "data.jsonl") if 0.5 <= u.duration <= 0.8]
    assert 1 < found["n_utterances"] == len(chosen) < N
    assert found["data"]["name"].endswith("0.5-0.8 s, noise at 5 dB")
    assert "5 dB below each clip" in (run / "report.html").read_text()
    clips = noisy([load_utterance(u) for u in chosen], 5.0, 0)
    lm = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    nll = lm.score(clips, [u.text for u in chosen]).nll
    row = rows[rows.condition == "intact"].set_index("utterance").loc[[u.id for u in chosen]]
    assert row.nll.tolist() == pytest.approx(nll.tolist(), rel=1e-4)


def test_speech_can_be_hidden_from_speech_that_sounds_later(folder):
    run = folder / "far"
    words = ["--knockout", "--readers", "speech", "--beyond", "0.5", "--out", str(run)]
    ablate.main(arguments(folder, *words))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    assert found["question"]["readers"] == "speech" and found["question"]["beyond"] == 0.5
    assert (rows[rows.condition == "knock-out"].kl > 0).any()
    *others, last = found["layers"]  # what it changes there is read by nobody
    assert last["kl"] == 0 and last["zero_by_construction"]
    assert not any(layer["zero_by_construction"] for layer in others)
    page = (run / "report.html").read_text()
    assert "(as read from speech positions more than 0.5 s later)" in page


def test_clips_too_short_for_the_seconds_asked_about_are_left_out_and_listed(folder):
    run = folder / "seconds"
    ablate.main(
        arguments(folder, "--skip-layers", "1", "--positions", "speech:0.7-9", "--out", str(run))
    )
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    assert 0 < found["n_utterances"] < N and len(found["data"]["left_out"]) == N - len(
        set(rows.utterance)
    )
    assert (rows[rows.condition == "skip"].kl > 0).all()


def test_lora_can_only_be_switched_off_where_there_is_some():
    question = Question("without-lora", "all", EACH_BLOCK)
    assert question.targets(4, 2, [0, 2]) == [Target((0,)), Target((2,))]
    for layers, there in (("1", [0, 2]), ("suffixes", [0, 2]), (EACH_BLOCK, [])):
        with pytest.raises(UsageError, match=r"--without-lora.*LoRA"):
            question._replace(layers=layers).targets(4, 2, there)


def test_what_the_decoder_has_no_room_for_is_named_or_left_out(folder, tmp_path, capsys):
    few = read_manifest(folder / "data.jsonl")[:3]
    long = waves(60.0)[0]
    soundfile.write(tmp_path / "long.flac", long, 16_000)
    few.append(Utterance("long.flac", tmp_path / "long.flac", "one", 60.0))
    data = tmp_path / "data.jsonl"
    write_manifest(data, few)
    model = ["--checkpoint", str(folder / "model"), "--device", "cpu"]
    reason = r"data\.jsonl:4: .*long\.flac: 60\.0 s of audio .* the decoder has 512: cut it"
    ablation = ["--skip-layers", "1", *model, "--data", str(data), "--out", str(tmp_path / "run")]
    evaluation = [str(data), *model]
    for command, words in ((ablate.main, ablation), (evaluate.main, evaluation)):
        with pytest.raises(BadAudio, match=reason):
            command(words)
        command([*words, "--on-bad-audio", "skip"])
    assert re.search(reason, results(tmp_path / "run")["data"]["left_out"][0])
    files = [str(folder / "0.flac"), str(tmp_path / "long.flac")]
    with pytest.raises(BadAudio, match=r"long\.flac: 60\.0 s and 128 tokens take"):
        transcribe.main([*files, *model])
    capsys.readouterr()
    transcribe.main([*files, *model, "--on-bad-audio", "skip"])
    told = capsys.readouterr()
    assert json.loads(told.out)["audio_filepath"] == files[0] and "long.flac" in told.err


def test_a_model_that_was_told_where_to_listen_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "recipe.json"
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps(recipe | {"frames": {"phones_after": 1, "tokens_after": 2}}))
    ablate.main(arguments(tmp_path / "copy", "--skip-layers", "1", "--out", str(tmp_path / "run")))
    found = results(tmp_path / "run")
    assert found["checkpoint"]["targets_after"] == [1, 2]
    assert "right after blocks 1 and 2, which draws hearing down to there" in found["warnings"][0]


@pytest.mark.parametrize(
    ("by", "says"),
    [("resample", "another clip of like length"), ("noise:3", "the same clip in noise 3 dB below")],
)
def test_patches_come_from_another_run(folder, by, says):
    run = folder / f"patch-{by[:5]}"
    ablate.main(arguments(folder, "--patch", "--by", by, "--out", str(run)))
    found, rows = results(run), pd.read_parquet(run / "rows.parquet")
    assert says in (run / "report.html").read_text()
    assert not any(layer["zero_by_construction"] for layer in found["layers"])
    assert all(layer["attribution"] is not None for layer in found["layers"])
    # Row for row what the library gives.
    utterances = read_manifest(folder / "data.jsonl")
    clips, texts = [load_utterance(u) for u in utterances], [u.text for u in utterances]
    others = [np.resize(clips[i], len(clips[k])) for k, i in enumerate(swap_partners(utterances))]
    if by != "resample":
        rngs = [np.random.default_rng(zlib.crc32(u.id.encode())) for u in utterances]
        others = [add_noise(clip, 3.0, rng) for clip, rng in zip(clips, rngs, strict=True)]
    lm = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    entering, first_order = lm.entering(others), lm.attribution(others, clips, texts)
    patched = rows[rows.condition == "patch"].set_index(["layer", "utterance"])
    for layer in range(N_LAYERS):
        with lm.patch({layer: entering[layer]}):
            expected = lm.score(clips, texts).nll
        measured = patched.loc[[(str(layer), u.id) for u in utterances]]
        assert measured.nll.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
        assert measured.attribution.tolist() == pytest.approx(first_order[layer].tolist(), abs=1e-3)


def test_memory_bounds_what_a_study_holds():
    """Measured on a tiny model, whose blocks matter less and logits more than a real one's."""
    lm, clips = tiny_listener(), waves(*np.linspace(0.5, 3.0, 12))
    utterances = [
        Utterance(str(i), Path(f"{i}.wav"), f"{WORDS[i]} please", len(w) / 16_000)
        for i, w in enumerate(clips)
    ]
    question = Question("skip", "speech", EACH_BLOCK)
    sizes = [clip_bytes(lm, wave, u.text, 20) for wave, u in zip(clips, utterances, strict=True)]
    first, partners = Target((0,)), swap_partners(utterances)
    study = LayerStudy("run", utterances, clips, partners, question, [first], 20)
    small = replace(study, memory_mb=math.ceil(2 * max(sizes) / 1e6))
    assert len(study.batches(lm)) == 1 < len(small.batches(lm))
    assert sorted(i for batch in small.batches(lm) for i in batch) == list(range(12))
    with pytest.raises(UsageError, match=r"11.wav: takes \d+ MB in a study, and there are 0"):
        replace(study, memory_mb=0).batches(lm)
    weights = sum(p.nbytes for p in (*lm.model.parameters(), *lm.model.buffers()))

    def hear():
        batch = StudyBatch(lm, study, list(range(12)))
        batch.swapped  # noqa: B018
        list(batch.replay.hear_each([batch.variant(first)]))

    assert 0.3 < (peak_bytes(lm.model, hear) - weights) / sum(sizes) < 1.2
