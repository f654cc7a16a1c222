"""Residuals caught while a model runs, written in shards, and read back without the model."""

import json
import subprocess
import sys
from functools import partial
from itertools import chain

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import melprobe
from melprobe import capture, shards
from melprobe.audio.mel import frame_count
from melprobe.audio.patches import patch_count, patch_middle
from melprobe.captured import INDEX, Capture
from melprobe.corpus.manifest import read_manifest
from melprobe.corpus.text import plain_text
from melprobe.errors import UsageError
from melprobe.hooks.layers import decoder_blocks, parse_residuals
from melprobe.hooks.positions import Kind
from melprobe.shards import CaptureWriter
from tests.tiny import N_CLIPS, N_LAYERS, TEXTS, tiny_config, tiny_listener

ALL = range(N_LAYERS + 1)
WIDTH = tiny_config().text_config.hidden_size


def caught_in_one_pass(lm, clips, *args):
    seen = []
    with lm.capture(*args, take=seen.append):
        lm.score(clips, TEXTS)
    (caught,) = seen
    return caught


def inputs_of(lm, clips):
    return lm.processor(clips, TEXTS)


@torch.no_grad()
def block_by_block(lm, clips):
    """h_0 … h_L, each (B, S, D), by a loop over the blocks."""
    inputs = inputs_of(lm, clips)
    mask, decoder = inputs["attention_mask"], lm.model.get_decoder()
    h = lm.model.embed(
        inputs["input_ids"], inputs["input_features"], inputs["feature_attention_mask"]
    )
    places = (mask.cumsum(1) - 1).clamp(min=0)
    causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()[None, None]
    allowed = causal & mask.bool()[:, None, None]
    rotary = decoder.rotary_emb(h, position_ids=places)
    found = [h]
    for block in decoder_blocks(lm.model):
        h = block(h, attention_mask=allowed, position_ids=places, position_embeddings=rotary)
        found.append(h)
    return found


def test_residuals_are_those_of_a_loop_over_the_blocks_and_of_transformers(clips):
    lm = tiny_listener()
    caught = caught_in_one_pass(lm, clips, ALL, "all")
    inputs = inputs_of(lm, clips)
    there = inputs["attention_mask"].bool()
    for number, expected in enumerate(block_by_block(lm, clips)):
        assert torch.equal(caught.h(number), expected[there])
    with torch.no_grad():  # last, since it leaves hooks behind
        output = lm.model.get_decoder()(
            inputs_embeds=block_by_block(lm, clips)[0],
            attention_mask=inputs["attention_mask"],
            position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
        )
        *before, last = output.hidden_states
        normed = lm.model.get_decoder().norm(caught.h(N_LAYERS))
    for number, expected in enumerate(before):
        assert torch.equal(caught.h(number), expected[there])
    torch.testing.assert_close(normed, last[there])


@pytest.mark.parametrize("positions", ["bos", "prompt", "speech", "answer", "text", "all"])
def test_rows_say_where_they_stand_and_when_they_sound(clips, positions):
    lm = tiny_listener()
    caught = caught_in_one_pass(lm, clips, [0], positions)
    expected = []
    for clip, (wave, text) in enumerate(zip(clips, TEXTS, strict=True)):
        n_patches = patch_count(frame_count(len(wave)), lm.processor.frames_per_patch)
        n_prompt = len(lm.processor.text_prompt("")) - 1
        n_answer = len(lm.processor.answer_ids(text))
        kinds = [Kind.BOS] + [Kind.SPEECH] * n_patches + [Kind.PROMPT] * n_prompt
        kinds += [Kind.ANSWER] * n_answer
        groups = {"all": set(Kind), "text": {Kind.PROMPT, Kind.ANSWER}}
        wanted = groups.get(positions) or {Kind[positions.upper()]}
        for position, kind in enumerate(kinds):
            if kind in wanted:
                patch = position - 1  # BOS stands in front
                sounds = kind is Kind.SPEECH
                middle = patch_middle(patch, lm.processor.frames_per_patch) if sounds else None
                expected.append((clip, position, kind, middle))
    assert caught.clip.tolist() == [row[0] for row in expected]
    assert caught.position.tolist() == [row[1] for row in expected]
    assert caught.kind.tolist() == [row[2] for row in expected]
    for seconds, (*_, middle) in zip(caught.seconds.tolist(), expected, strict=True):
        assert seconds != seconds if middle is None else seconds == pytest.approx(middle)


def test_seconds_choose_patches(lm, clips):
    whole = caught_in_one_pass(lm, clips, [2], "speech")
    part = caught_in_one_pass(lm, clips, [2], "speech:0.3-0.6")
    inside = (whole.seconds >= 0.3) & (whole.seconds < 0.6)
    assert 0 < inside.sum() < len(inside)
    assert torch.equal(part.h(2), whole.h(2)[inside])


def test_while_decoding_every_step_is_a_pass_and_padding_does_not_count(lm, clips):
    seen = []
    with lm.capture([1], "all", take=seen.append):
        lm.transcribe(clips, 3)
    first, *steps = seen
    for clip in range(len(clips)):
        places = [caught.position[caught.clip == clip].tolist() for caught in seen]
        assert list(chain(*places)) == list(range(sum(map(len, places))))
    assert (first.kind == Kind.BOS).sum() == len(clips) and steps
    assert all((step.kind == Kind.ANSWER).all() for step in steps)


@pytest.mark.parametrize("capture_first", [False, True])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_under_a_skip_what_leaves_the_block_is_what_entered_it(clips, layer, capture_first):
    lm, seen = tiny_listener(), []
    cut, listen = lm.skip({layer}), lm.capture(ALL, "all", take=seen.append)
    first, second = (listen, cut) if capture_first else (cut, listen)
    with first, second:
        lm.score(clips, TEXTS)
    h, speech = seen[0].h, seen[0].kind == Kind.SPEECH
    assert torch.equal(h(layer + 1)[speech], h(layer)[speech])
    assert not torch.equal(h(layer + 1)[~speech], h(layer)[~speech])


def test_capturing_changes_nothing_and_leaves_nothing_behind(lm, clips):
    plain = lm.score(clips, TEXTS).log_probs
    with lm.capture(ALL, "all", take=lambda caught: 1):  # what it returns must not get out
        assert torch.equal(lm.score(clips, TEXTS).log_probs, plain)

    def fail(caught):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lm.capture(ALL, take=fail):
        lm.score(clips, TEXTS)
    for module in lm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_pass_that_fails_hands_out_nothing(lm, clips):
    seen = []
    with lm.capture(ALL, take=seen.append):
        broken = decoder_blocks(lm.model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.score(clips, TEXTS)
        broken.remove()
        lm.score(clips[:1], TEXTS[:1])
    (caught,) = seen
    assert set(caught.clip.tolist()) == {0}


def test_what_is_caught_is_rounded_to_the_dtype(lm, clips):
    exact = caught_in_one_pass(lm, clips, [3]).h(3)
    rounded = caught_in_one_pass(lm, clips, [3], "speech", torch.bfloat16).h(3)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize(
    ("numbers", "positions", "message"),
    [
        ({N_LAYERS + 1}, "speech", "layers 5: this model has residuals 0 to 4"),
        ({-1}, "speech", "layers -1: this model has residuals 0 to 4"),
        ({0}, "noise", "positions 'noise': there are bos, prompt"),
    ],
)
def test_what_the_model_lacks_is_refused(lm, numbers, positions, message):
    with pytest.raises(UsageError, match=message), lm.capture(numbers, positions, take=print):
        pass


def test_all_residuals_are_one_more_than_the_blocks():
    assert parse_residuals("all", 4) == [0, 1, 2, 3, 4]
    assert parse_residuals("0,3-4", 4) == [0, 3, 4]


def command(folder, out, *words):
    place = ["--checkpoint", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    return [*place, "--device", "cpu", "--model-dtype", "float32", "--out", str(out), *words]


SMALL = ("--shard-mb", "0.01")
"""Rows of five residuals take 640 bytes: some 15 rows in a shard, two clips."""


@pytest.fixture(scope="module")
def written(folder):
    out = folder / "captured"
    capture.main(command(folder, out, "--positions", "all", *SMALL))
    return out


def test_what_is_read_back_is_what_was_caught(folder, written):
    captured = Capture.open(written)
    assert captured.index["shards"] > 2 and captured.numbers == list(ALL)
    lm = melprobe.load(folder / "model", device="cpu", dtype=torch.float32)
    utterances = read_manifest(folder / "data.jsonl")
    waves = {u.id: capture.load_utterance(u) for u in utterances}
    plan = capture.batches(lm, utterances, [waves[u.id] for u in utterances])
    rows = captured.rows
    assert len(rows) == captured.index["rows"]
    for batch in plan:
        chosen, seen = [utterances[i] for i in batch], []
        with lm.capture(ALL, "all", take=seen.append), torch.no_grad():
            texts = [plain_text(u.text) for u in chosen]
            lm.model(**lm.processor([waves[u.id] for u in chosen], texts))
        for clip, u in enumerate(chosen):
            of_clip = seen[0].clip == clip
            mine = rows.index[rows.utterance == u.id]
            assert rows.position[mine].tolist() == seen[0].position[of_clip].tolist()
            assert list(rows.kind[mine]) == [
                Kind(k).name.lower() for k in seen[0].kind[of_clip].tolist()
            ]
            assert rows.seconds[mine].notna().tolist() == (rows.kind[mine] == "speech").tolist()
            for number in ALL:
                expected = seen[0].h(number)[of_clip]
                assert torch.equal(captured.residual(number)[torch.tensor(mine)], expected)


def test_the_index_says_what_is_where(folder, written):
    captured = Capture.open(written)
    for u in read_manifest(folder / "data.jsonl"):
        known = captured.utterances.loc[u.id]
        assert known.text == u.text and known.speaker == u.speaker
        mine = captured.rows.iloc[known.first_row : known.first_row + known.rows]
        assert (mine.utterance == u.id).all()
        assert (captured.rows.utterance == u.id).sum() == len(mine)
    in_shards = captured.utterances.groupby("shard").rows.sum()
    assert [len(piece) for piece in captured.pieces(2)] == in_shards.tolist()
    assert captured.residual(2).shape == (len(captured.rows), WIDTH)
    with pytest.raises(UsageError, match="h_7 was not captured; there are 0-4"):
        captured.residual(7)


def test_the_command_says_what_it_wrote(folder, tmp_path, capsys):
    words = command(folder, tmp_path / "out", "--layers", "0,3-4", "--dtype", "float16")
    capture.main(words)
    found = json.loads(capsys.readouterr().out)
    captured = Capture.open(tmp_path / "out")
    assert found["utterances"] == N_CLIPS and found["rows"] == len(captured.rows)
    assert found["shards"] == 1 and found["rtfx"] > 0
    assert captured.numbers == [0, 3, 4] and captured.residual(3).dtype == torch.float16
    assert captured.index["patches_per_second"] == 12.5 and captured.index["versions"]["torch"]
    before = (tmp_path / "out" / INDEX).read_bytes()
    capture.main(words)  # nothing is left to do
    assert json.loads(capsys.readouterr().out)["rtfx"] is None
    assert (tmp_path / "out" / INDEX).read_bytes() == before


def shards_of(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def utterances_of(folder):
    return json.loads((folder / INDEX).read_text())["utterances"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_killed_and_started_again_the_folder_is_the_same(folder, written, tmp_path, stop_at):
    """By a signal that nothing can catch, between a shard's draft and its name."""
    words = command(folder, tmp_path / "out", "--positions", "all", *SMALL)
    killed = (
        "import os, signal, sys\n"
        "from melprobe import capture, shards\n"
        "save, calls = shards.save_file, []\n"
        "def save_and_die(*args):\n"
        "    save(*args)\n"
        "    calls.append(args)\n"
        f"    if len(calls) > {stop_at}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.save_file = save_and_die\n"
        "capture.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, *words], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == stop_at
    with pytest.raises(UsageError, match="not finished"):
        Capture.open(tmp_path / "out")
    capture.main(words)
    again, whole = shards_of(tmp_path / "out"), shards_of(written)
    # Not bytes: now and then a process rounds a little differently from another.
    torch.testing.assert_close(again, whole, rtol=1e-2, atol=1e-3, equal_nan=True)
    assert utterances_of(tmp_path / "out") == utterances_of(written)
    assert not list((tmp_path / "out").glob("*.draft"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "5"], "layers 5: this model has residuals 0 to 4"),
        (["--layers", "zwei"], "is not a number or a range"),
        (["--positions", "noise"], "positions 'noise': there are bos"),
        (["--positions", "speech:7-9"], "no patch of any clip has its middle there"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--shard-mb", "0"], "--shard-mb 0.0: take a number above 0"),
        (["--limit", "-1"], "--limit -1"),
        (["--lengths", "90-99"], "--lengths 90-99: no clip lasts so long"),
        (["--device", "tpu"], "device"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        capture.main(command(folder, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_line_and_code_2(folder, tmp_path):
    words = command(folder, tmp_path / "out", "--layers", "5")
    done = subprocess.run(
        [sys.executable, "-m", "melprobe.capture", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "melprobe: layers 5: this model has residuals 0 to 4\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "1"], 'layers = "0-4" there, "1" now'),
        (["--positions", "speech"], "positions"),
        (["--positions", "all", "--dtype", "bfloat16"], "dtype"),
        (["--limit", "2"], "other utterances"),
    ],
)
def test_a_folder_belongs_to_one_capture(folder, written, words, message):
    before = contents(written)
    with pytest.raises(UsageError, match=f"made with other settings.*{message}"):
        capture.main(command(folder, written, *SMALL, *words))
    assert contents(written) == before


def test_a_folder_with_other_files_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files \(mine\)"):
        capture.main(command(folder, tmp_path))
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(UsageError, match="damaged, or not a capture's"):
        capture.main(command(folder, tmp_path))


def test_where_nothing_can_be_written_is_said_before_any_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="this is a file; name a folder"):
        capture.main(command(folder, tmp_path / "file"))


def test_two_processes_do_not_write_into_one_folder(folder, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(UsageError, match="another process"):
        capture.main(command(folder, tmp_path))


def test_a_full_disk_stops_the_run_with_one_line(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(UsageError, match=r"00000\.safetensors: .*No space left"):
        capture.main(command(folder, tmp_path / "out", *SMALL))


@pytest.mark.parametrize("size", ["1e9", "1e300"])
def test_a_shard_that_memory_cannot_hold_is_refused(folder, tmp_path, size):
    with pytest.raises(UsageError, match=r"no memory for a shard of .* MB: take a smaller one"):
        capture.main(command(folder, tmp_path / "out", "--shard-mb", size))
    capture.main(command(folder, tmp_path / "out"))  # what is changed is taken up by the same --out
    assert Capture.open(tmp_path / "out").index["settings"]["shard_mb"] == 64


def test_numbers_beyond_float16_are_refused(tmp_path, clips):
    lm = tiny_listener()
    lm.model.audio_front.projection.weight.data *= 1e6
    writer = CaptureWriter(tmp_path, {}, {}, [{"utterance": str(i)} for i in range(3)], 1)
    take = partial(writer.add, numbers=range(3))
    with (
        pytest.raises(UsageError, match="h_0 of 0 holds numbers beyond float16"),
        writer,
        lm.capture([0], "speech", torch.float16, take=take),
    ):
        lm.score(clips, TEXTS)


def test_a_damaged_shard_is_named(written, tmp_path):
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00001.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"00001\.safetensors: missing or damaged"):
        Capture.open(tmp_path).residual(0)


def test_bad_audio_ends_the_command_or_is_left_out(folder, tmp_path, capsys):
    lines = (folder / "data.jsonl").read_text().splitlines()
    for line in lines[1:]:
        name = json.loads(line)["audio"]
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / json.loads(lines[0])["audio"]).write_bytes(b"")
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = command(folder, tmp_path / "out", "--data", str(tmp_path / "data.jsonl"))
    with pytest.raises(UsageError, match=r"data.jsonl:1: .*0.flac: the file is empty"):
        capture.main(words)
    capture.main([*words, "--on-bad-audio", "skip"])
    found = json.loads(capsys.readouterr().out)
    assert found["utterances"] == N_CLIPS - 1 and len(found["left_out"]) == 1


def test_reading_a_capture_imports_no_model(written):
    code = (
        "import sys; from melprobe.captured import Capture; c = Capture.open(sys.argv[1]); "
        "c.rows, c.residual(0); "
        "print([m for m in sys.modules if m.startswith(('melprobe.model', 'transformers'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(written)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
