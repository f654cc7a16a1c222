"""Recordings inside tars: what is packed, what others wrote, what training reads of it."""

import gzip
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from melprobe import train
from melprobe.audio import load
from melprobe.audio.load import BadAudio, load_utterance
from melprobe.corpus.__main__ import main
from melprobe.corpus.manifest import Bytes, find_manifest, read_manifest, write_manifest
from melprobe.errors import UsageError
from melprobe.training.clips import load_corpora
from melprobe.training.processes import WHOLE, Share
from melprobe.training.recipe_file import read_recipe
from melprobe.training.speech import SpeechTask
from tests.test_training import losses, make_workshop


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MELPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000))


def encoded(wave: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=kind)
    return file.getvalue()


def write_tar(path: Path, *files: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def same_but_for_place(one, other) -> bool:
    return replace(one, audio=Path(), bytes=None, where="") == replace(
        other, audio=Path(), bytes=None, where=""
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """That of the training tests, and in `tars` its manifests packed into tars of a few clips."""
    folder = tmp_path_factory.mktemp("tars")
    make_workshop(folder)
    manifests = [str(folder / f"{split}.jsonl") for split in ("train", "dev")]
    main(["pack", *manifests, "--out", str(folder / "tars"), "--shard-mb", "0.1"])
    return folder


# pack


def test_what_is_packed_is_read_to_the_sample_and_has_the_same_ids(workshop):
    tars = sorted(path.name for path in (workshop / "tars").glob("*.tar"))
    assert len(tars) > 4 and tars[0] == "dev-000000.tar"
    assert all((workshop / "tars" / name).stat().st_size < 130_000 for name in tars)
    for split in ("train", "dev"):
        files = read_manifest(workshop / f"{split}.jsonl")
        packed = read_manifest(workshop / "tars" / f"{split}.jsonl")
        for one, other in zip(files, packed, strict=True):
            assert same_but_for_place(one, other)
            assert np.array_equal(load_utterance(one), load_utterance(other))


def test_packing_again_and_reading_the_tars_alone_give_the_same(workshop, tmp_path):
    packed = workshop / "tars" / "dev.jsonl"
    main(["pack", str(packed), "--out", str(tmp_path / "again")])
    assert len(list((tmp_path / "again").glob("*.tar"))) == 1
    again = read_manifest(tmp_path / "again" / "dev.jsonl")
    main(["build", "shards", str(tmp_path / "again"), "--name", "alone"])
    alone = read_manifest(find_manifest("alone/train"))
    assert alone[0].id == "dev-000000.tar/00000000.flac"
    for one, other, third in zip(read_manifest(packed), again, alone, strict=True):
        assert same_but_for_place(one, other)
        assert (third.text, third.speaker) == (one.text, one.speaker)
        assert third.bytes == other.bytes
        assert np.array_equal(load_utterance(one), load_utterance(third))


def test_a_clip_that_is_missing_leaves_no_folder_or_is_listed(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(0.5), 16_000)
    (tmp_path / "empty.wav").touch()
    lines = [{"audio": f"{n}.wav", "text": n, "duration": 0.5} for n in ("a", "gone", "empty")]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["pack", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "new" / "tars")]
    with pytest.raises(BadAudio, match=r"own\.jsonl:2: .*gone\.wav: the file is missing"):
        main(argv)
    assert not list((tmp_path / "new").iterdir())
    main([*argv, "--on-bad-audio", "skip"])
    said = capsys.readouterr().err
    assert "gone.wav: the file is missing" in said and "empty.wav: the file is empty" in said
    assert [u.id for u in read_manifest(tmp_path / "new" / "tars" / "own.jsonl")] == ["a.wav"]
    with pytest.raises(UsageError, match="is there already; name a new folder"):
        main(argv)


def test_pack_refuses_two_splits_of_one_name_and_tars_of_no_size(tmp_path, workshop):
    twice = [str(workshop / "dev.jsonl"), str(workshop / "tars" / "dev.jsonl")]
    with pytest.raises(UsageError, match="a second manifest called dev"):
        main(["pack", *twice, "--out", str(tmp_path / "x")])
    with pytest.raises(UsageError, match="--shard-mb"):
        main(["pack", twice[0], "--out", str(tmp_path / "x"), "--shard-mb", "0"])


# A line of a manifest


def test_a_line_names_any_bytes_of_a_file_with_any_name(tmp_path):
    wave = noise(0.5)
    shard = tmp_path / "a#1+2 [ü].tar"
    shard.write_bytes(b"x" * 700 + encoded(wave, "WAV") + b"y" * 700)
    size = shard.stat().st_size - 1400
    line = {"audio": shard.name, "bytes": [700, size], "text": "a", "duration": 0.5}
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    (u,) = read_manifest(tmp_path / "m.jsonl")
    assert u.bytes == Bytes(700, size) and u.id == f"{shard.name}/700"
    assert len(load_utterance(u)) == 8000
    write_manifest(tmp_path / "again.jsonl", [u])
    (again,) = read_manifest(tmp_path / "again.jsonl")
    assert replace(again, where=u.where) == u


@pytest.mark.parametrize(
    "place", ["7", "[0]", "[-1, 5]", "[0, 0]", "[0.5, 3]", '["0", 3]', "[0, 1, 2]"]
)
def test_bytes_that_are_no_place_name_line_and_field(tmp_path, place):
    line = f'{{"audio": "a.tar", "text": "a", "duration": 1, "bytes": {place}}}'
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(UsageError, match=r"m\.jsonl:1: bytes: must be \[offset, size\]"):
        read_manifest(tmp_path / "m.jsonl")


def test_an_id_is_read_beside_bytes_alone_and_is_unique(tmp_path):
    line = '{"audio": "a.tar", "text": "a", "duration": 1, "id": 7%s}\n'
    (tmp_path / "m.jsonl").write_text(line % "")
    assert read_manifest(tmp_path / "m.jsonl")[0].id == "a.tar"
    (tmp_path / "m.jsonl").write_text(line % ', "bytes": [0, 9]')
    with pytest.raises(UsageError, match=r"m\.jsonl:1: id: must be a non-empty string, not 7"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text((line % ', "bytes": [0, 9]').replace("7", '"x"') * 2)
    with pytest.raises(UsageError, match=r"m\.jsonl:2: id: x is already at .*m\.jsonl:1"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"audio": Path("/gone.tar")}, "the file is missing"),
        ({"bytes": Bytes(10**15, 10**15)}, "the file ends before that, it has 20480 bytes"),
        ({"bytes": Bytes(512, 10**6)}, "the file ends before that"),
        ({"bytes": Bytes(512, 8022)}, "cut short: 0.25 s of the 0.50 s that its header states"),
        ({"bytes": Bytes(0, 512)}, "not audio that libsndfile reads"),
        ({"duration": 0.9}, "cut short: 0.50 s of the 0.90 s that the manifest states"),
    ],
)
def test_bad_bytes_name_line_file_place_and_reason(tmp_path, change, reason):
    tar = write_tar(tmp_path / "a.tar", ("k.wav", encoded(noise(0.5), "WAV")), ("k.txt", b"hi"))
    main(["build", "shards", str(tmp_path), "--name", "web"])
    (u,) = read_manifest(find_manifest("web/train"))
    assert len(load_utterance(u)) == 8000
    with pytest.raises(BadAudio) as error:
        load_utterance(bad := replace(u, **change))
    message = str(error.value)
    assert message.startswith(f"{u.where}: {bad.audio.parent}") and reason in message
    assert f"{bad.bytes.size} bytes from {bad.bytes.offset} on (a.tar/k.wav)" in message
    assert "\n" not in message and tar.stat().st_size == 20480


# build shards


def test_webdataset_tars_of_any_format_and_order_are_read(tmp_path):
    one, two = noise(0.5, 1), noise(0.7, 2)
    said = {"text": "Two", "speaker": 1089, "duration": 0.7, "words": ["not", "ours"]}
    long = "a/" + "long" * 40
    write_tar(
        tmp_path / "x" / "0.tar",
        ("a/one.WAV", encoded(one, "WAV")),
        ("a/one.txt", "Öne\n".encode()),
        ("a/two.json", json.dumps(said).encode()),
        ("a/two.16k.flac", encoded(two, "FLAC")),
        ("a/._two.flac", b"a Mac's"),
    )
    lossy = ("a/b.mp3", encoded(two, "MP3")), ("a/b.json", b'{"text": "no"}')
    write_tar(
        tmp_path / "y" / "0.tar",
        *lossy,
        ("a/b.txt", b"Three"),
        (f"{long}.ogg", encoded(two, "OGG")),
        (f"{long}.txt", b"Four"),
    )
    argv = ["build", "shards", *(str(tmp_path / n) for n in "xyx"), "--name", "web"]
    main([*argv, "--split", "dev"])
    found = read_manifest(find_manifest("web/dev"))
    assert [u.text for u in found] == ["Öne", "Two", "Three", "Four"]
    assert [u.speaker for u in found] == ["", "1089", "", ""] and found[0].source == "web"
    ids = ["x/0.tar/a/one.WAV", "x/0.tar/a/two.16k.flac", "y/0.tar/a/b.mp3"]
    assert [u.id for u in found] == [*ids, f"y/0.tar/{long}.ogg"]
    for u, wave in zip(found, (one, two, two, two), strict=True):
        assert u.duration == pytest.approx(len(wave) / 16_000, abs=0.05)
        loaded = load_utterance(u)
        if u.text in ("Öne", "Two"):
            assert np.abs(loaded - wave).max() < 1e-4


def cut(folder: Path, i: int, seconds: float) -> object:
    path = folder / f"{i}.wav"
    soundfile.write(path, noise(seconds, i), 16_000)
    whole = Recording.from_file(path, recording_id=f"r{i}")
    words = [AlignmentItem("one", 0.1, 0.1), AlignmentItem("", 0.2, 0.1)]
    halves = [
        SupervisionSegment(f"{i}b", f"r{i}", 0.3, 0.2, text="two", speaker="S"),
        SupervisionSegment(
            f"{i}a", f"r{i}", 0.0, 0.3, text="One", speaker="S", alignment={"word": words}
        ),
    ]
    made = whole.to_cut()
    made.id, made.supervisions = f"set/a.{i}", halves
    return made


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_shar_as_lhotse_writes_it_is_read(tmp_path, kind):
    cuts = [cut(tmp_path, i, 0.7 + i / 10) for i in range(4)]
    shar = tmp_path / "shar"
    shar.mkdir()
    CutSet.from_cuts(cuts).to_shar(shar, {"recording": kind}, shard_size=2)
    main(["build", "shards", str(shar), "--name", "shar"])
    found = read_manifest(find_manifest("shar/train"))
    assert found[0].id == f"recording.000000.tar/set/a.0.{kind}"
    assert {(u.text, u.speaker) for u in found} == {("One two", "S")}
    assert found[0].words == (("one", 0.1, 0.2),)
    there = CutSet.from_shar(in_dir=shar)
    for ours, theirs in zip(found, there, strict=True):
        assert ours.duration == pytest.approx(theirs.duration, abs=1e-4)
        assert np.array_equal(load_utterance(ours), theirs.load_audio()[0])


def test_times_that_lhotse_left_behind_are_not_taken(tmp_path, capsys):
    cuts = [cut(tmp_path, i, 0.7) for i in range(2)]
    cuts[1] = cuts[1].truncate(offset=0.25, preserve_id=True)
    shar = tmp_path / "shar"
    shar.mkdir()
    CutSet.from_cuts(cuts).to_shar(shar, {"recording": "wav"})
    main(["build", "shards", str(shar), "--name", "shar"])
    where = f"{shar / 'cuts.000000.jsonl.gz'}:2: set/a.1: its alignment lies outside"
    assert where in capsys.readouterr().err
    found = read_manifest(find_manifest("shar/train"))
    assert [u.words for u in found] == [(), ()]
    assert [len(load_utterance(u)) for u in found] == [11_200, 7_200]


WAV = encoded(noise(0.5), "WAV")
GOOD = [("g.wav", WAV), ("g.txt", b"hi")]
BAD = {
    "no text": ([("l.wav", WAV)], "l: text: must be a non-empty string"),
    "blank": ([("l.wav", WAV), ("l.txt", b" ")], "l: text: must be a non-empty string"),
    "two": ([("l.wav", WAV), ("l.flac", WAV)], "l: two members: l.wav and l.flac"),
    "twice": ([("l.wav", WAV), ("l.txt", b"x"), ("l.txt", b"x")], "l: two members: l.txt and"),
    "no audio": ([("l.m4a", WAV), ("l.txt", b"x")], "l: no audio (.flac .wav .ogg .mp3 .opus), "),
    "not audio": ([("l.wav", b"x" * 99), ("l.txt", b"x")], "l: l.wav is not audio that"),
    "empty": ([("l.wav", b""), ("l.txt", b"x")], "l: l.wav is empty (0 bytes)"),
    "not JSON": ([("l.wav", WAV), ("l.json", b"{")], "l: not UTF-8, or not JSON"),
    "not UTF-8": ([("l.wav", WAV), ("l.txt", b"\xff")], "l: not UTF-8, or not JSON"),
    "a list": ([("l.wav", WAV), ("l.json", b"[]")], "l: not a JSON object but list"),
    "long": (
        [("l.wav", WAV), ("l.json", b'{"text": "x", "duration": "long"}')],
        "l: duration: must be seconds",
    ),
}


def stops_or_is_listed(folder: Path, reason: str, capsys) -> list[str]:
    """The ids of what is taken with `--on-bad-audio skip`."""
    argv = ["build", "shards", str(folder), "--name", "web"]
    with pytest.raises(BadAudio) as error:
        main(argv)
    assert reason in str(error.value) and "\n" not in str(error.value)
    main([*argv, "--on-bad-audio", "skip"])
    assert reason in capsys.readouterr().err
    found = read_manifest(find_manifest("web/train"))
    assert all(len(load_utterance(u)) == 8000 for u in found)
    return [u.id for u in found]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_key_stops_the_build_or_is_listed(tmp_path, capsys, name):
    files, reason = BAD[name]
    write_tar(tmp_path / "a.tar", *files, *GOOD)
    reason = f"{tmp_path / 'a.tar'}: {reason}"
    assert stops_or_is_listed(tmp_path, reason, capsys) == ["a.tar/g.wav"]


@pytest.mark.parametrize(
    ("last", "after"), [(5000, "g.txt"), (-100, "g.txt"), (None, "l.wav")], ids=str
)
def test_a_tar_that_is_cut_short_gives_what_is_whole(tmp_path, capsys, last, after):
    """Inside a recording, inside its header, and between two files, where tarfile says nothing."""
    tar = write_tar(tmp_path / "a.tar", *GOOD, ("l.wav", WAV))
    with tarfile.open(tar) as whole:
        member = whole.getmember("l.wav")
    end = member.offset_data + -(-member.size // 512) * 512
    tar.write_bytes(tar.read_bytes()[: end if last is None else member.offset_data + last])
    reason = f"{tar}: cut short or damaged after {after}"
    assert stops_or_is_listed(tmp_path, reason, capsys) == ["a.tar/g.wav"]


@pytest.mark.parametrize("data", [b"", b"x" * 2000, "gz"], ids=["empty", "text", "compressed"])
def test_what_is_no_tar_is_said_to_be_none(tmp_path, capsys, data):
    write_tar(tmp_path / "b.tar", *GOOD)
    if data == "gz":
        data = gzip.compress((tmp_path / "b.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(data)
    reason = f"{tmp_path / 'a.tar'}: not a tar, or a compressed one"
    assert stops_or_is_listed(tmp_path, reason, capsys) == ["b.tar/g.wav"]


def test_folders_without_shards_and_tars_without_data_are_named(tmp_path):
    argv = ["build", "shards", "--name", "web"]
    with pytest.raises(UsageError, match="gone: no such folder"):
        main([*argv, str(tmp_path / "gone")])
    with pytest.raises(UsageError, match=r"holds neither \*\.tar nor the cuts"):
        main([*argv, str(tmp_path)])
    write_tar(tmp_path / "a.tar")
    with pytest.raises(UsageError, match=r"a\.tar: holds no files with keys"):
        main([*argv, str(tmp_path)])
    with pytest.raises(UsageError, match="no recording in its tars is usable"):
        main([*argv, str(tmp_path), "--on-bad-audio", "skip"])
    with pytest.raises(UsageError, match="--split"):
        main([*argv, str(tmp_path), "--split", "../x"])


@pytest.mark.parametrize("what", ["tar", "gz", "line", "text", "member", "part", "nodata"])
def test_a_bad_shar_stops_the_build_or_is_listed(tmp_path, capsys, what):
    cuts = [cut(tmp_path, i, 0.5) for i in range(4)]
    if what == "text":
        cuts[0].supervisions = []
    if what == "nodata":
        cuts[0].recording = None
    shar = tmp_path / "shar"
    shar.mkdir()
    CutSet.from_cuts(cuts).to_shar(shar, {"recording": "wav"}, shard_size=2)
    first, tar = shar / "cuts.000000.jsonl.gz", shar / "recording.000000.tar"
    lines = gzip.decompress(first.read_bytes()).decode().splitlines()
    left = 3
    match what:
        case "tar":
            tar.unlink()
            left, reason = 2, f"{tar}: the file is missing"
        case "gz":
            first.write_bytes(first.read_bytes()[:-9])
            left, reason = None, f"{first}:"
        case "line":
            first.write_bytes(gzip.compress(f"{lines[0]}\n{{}}\n".encode()))
            reason = f"{first}:2: cut short, or not cuts"
        case "text":
            reason = f"{first}:1: set/a.0: text: must be"
        case "member":
            first.write_bytes(gzip.compress(lines[1].encode()))
            reason = f"{tar}: set/a.0.wav: no cut in {first.name}"
        case "part":
            record = json.loads(lines[0]) | {"start": 0.1, "duration": 0.4}
            first.write_bytes(gzip.compress(f"{json.dumps(record)}\n{lines[1]}".encode()))
            reason = f"{first}:1: set/a.0: is a part of its recording"
        case "nodata":
            reason = f"{first}:1: set/a.0: not a cut of one recording"
    found = stops_or_is_listed(shar, reason, capsys)
    assert left is None or len(found) == left


def test_a_tar_of_shar_without_cuts_stops_the_build(tmp_path):
    CutSet.from_cuts([cut(tmp_path, i, 0.5) for i in range(2)]).to_shar(
        tmp_path, {"recording": "wav"}, shard_size=1
    )
    (tmp_path / "cuts.000001.jsonl.gz").unlink()
    with pytest.raises(UsageError, match=r"recording\.000001\.tar: its cuts are missing"):
        main(["build", "shards", str(tmp_path), "--name", "shar"])


# Training


def on_tars(workshop: Path) -> dict[str, str]:
    """The change of a recipe that has it read the packed manifests."""
    tars = workshop / "tars"
    return {
        "data.train": f"[{{manifest: {tars / 'train.jsonl'}}}]",
        "data.dev": f"[{tars / 'dev.jsonl'}]",
    }


def test_a_run_on_tars_has_the_losses_of_one_on_files(workshop):
    options = [f"--{key}={value}" for key, value in on_tars(workshop).items()]
    recipe = [str(workshop / "recipe.yaml"), "--precision", "float32"]
    train.main([*recipe, "--out", str(workshop / "of-files")])
    train.main([*recipe, "--out", str(workshop / "of-tars"), *options])
    assert losses(workshop / "of-tars") == losses(workshop / "of-files")


def test_a_share_of_a_packed_corpus_is_the_same_clips(workshop):
    def chosen(manifest: Path) -> list[str]:
        changes = {"data.train": f"[{{manifest: {manifest}, share: 0.5}}]"}
        clips, _ = load_corpora(read_recipe(workshop / "recipe.yaml", changes).data)
        return [clip.id for clip in clips]

    assert chosen(workshop / "tars" / "train.jsonl") == chosen(workshop / "train.jsonl")
    assert 0 < len(chosen(workshop / "train.jsonl")) < 20


def test_two_processes_read_each_clip_of_an_epoch_once_between_them(workshop, monkeypatch):
    read, read_bytes = [], load.read_bytes

    def counted(path, name, within=None):
        read.append((path, within))
        return read_bytes(path, name, within)

    monkeypatch.setattr(load, "read_bytes", counted)
    changes = {**on_tars(workshop), "data.stages": "[{steps: 98}]"}
    task = SpeechTask(read_recipe(workshop / "recipe.yaml", changes))
    clips = read_manifest(workshop / "tars" / "train.jsonl")

    def epoch(share: Share, batches: int) -> Counter:
        own = Counter()
        read.clear()
        for _, batch in islice(task.batches(0, share), batches):
            if (
                "idle" not in batch
            ):  # of a batch of one clip, which the second process reads in vain
                own.update(read)
            read.clear()
        return own

    everything = Counter((u.audio, u.bytes) for u in clips)
    batches = next(n for n in range(2, 99) if epoch(WHOLE, n).total() >= len(clips))
    assert epoch(WHOLE, batches) == everything
    one, other = (epoch(Share(rank, 2), batches) for rank in range(2))
    assert one and other and one + other == everything
