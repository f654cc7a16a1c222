"""The game's data file: its texts find their clips, and its artists and scenes are held out."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from melprobe.corpus import queen
from melprobe.corpus.__main__ import main
from melprobe.corpus.manifest import Utterance, find_manifest, read_manifest
from melprobe.corpus.queen_bank import Bank, cutscene, dialogue
from melprobe.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MELPROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _pascal(text: str) -> bytes:
    return bytes([len(text)]) + text.encode("latin-1")


def _padded(data: bytes, step: int) -> bytes:
    return data + b"\0" * (-len(data) % step)


def dog(number: int, player: list[tuple[int, str]], other: list[tuple[int, str]]) -> bytes:
    def strings(lines: list[tuple[int, str]]) -> bytes:
        return b"".join(_padded(struct.pack(">I", key) + _pascal(text), 4) for key, text in lines)

    body = strings(player) + strings(other)
    start = 32 + 96 * 1
    ending = _padded(_pascal("Hello again.*02"), 2) + _padded(_pascal("You again!"), 2)
    head = struct.pack(">5h", -1, 1, number, len(player), len(other)).ljust(24, b"\0")
    head += struct.pack(">2H", start + len(body), start + len(body))
    return b"A" * 20 + head.ljust(start, b"\0") + body + ending


def cut(lines: list[tuple[int, str]]) -> bytes:
    moves = b""
    for number, (thing, _) in enumerate(lines):
        gestures = number % 2
        words = [thing, 0, 0, 0, 0, gestures, *[0] * 11, number]
        moves += struct.pack(">18h", *words) + b"\0\1" * number
        moves += (b"\0" * 20 + struct.pack(">h", -2)) * gestures
    texts = _pascal("*FR") + b"".join(_padded(_pascal(text), 2) for _, text in lines)
    head = struct.pack(">2h4xH", 2, -len(lines), 12 + len(moves)).ljust(12, b"\0")
    return b"A" * 20 + head + moves + texts


def bank(path: Path, files: dict[str, bytes]) -> Path:
    start = 15 + 21 * len(files)
    head = b"QTBLCEM10\0\0\0\0" + struct.pack(">H", len(files))
    body = b""
    for name, data in files.items():
        head += struct.pack(">12sBII", name.encode(), 1, start + len(body), len(data))
        body += data
    path.write_bytes(head + body)
    return path


def test_the_clip_names_of_dialogues_and_cutscenes_are_found():
    talk = dog(7, [(0, "Hi!"), (0x2A, "So?*03Well?")], [(0x1F, "*FLNo."), (0x412, "Yes.")])
    assert list(dialogue(talk)) == [
        ("07SSSSJ", "Hi!"),
        ("07002AJ", "So?*03Well?"),
        ("07001FP", "*FLNo."),
        ("070412P", "Yes."),
        ("07XXXXP", "Hello again.*02"),
        ("07XXXXJ", "You again!"),
    ]
    lines = [(0, "*"), (-2, "One."), (5, ""), (3, "Two!*01Three")]
    assert list(cutscene(cut(lines))) == lines


def test_a_planted_bank_is_built_with_its_speakers_and_reasons(tmp_path, cache, capsys):
    audio = tmp_path / "a.flac"
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_538) / 11_025)
    soundfile.write(audio, tone, 11_025)
    names = ["Trader Bob", "chief"]
    things = struct.pack(">4H", 1, 2, 2, 1)
    things += b"".join(struct.pack(">h14x", -number) for number in (1, 2))
    clips = ["JOE00412", "07002AJ2", "07001FP2", "070020P1", "C2A__021", "C2A__031", "C2A__041"]
    files = {f"{clip}.SB": audio.read_bytes() for clip in [*clips, "12SSSSSS", "07XXXXP1"]}
    files["07001FP2.SB"] = b"broken"
    files |= {
        "QUEEN.JAS": b"A" * 20 + things,
        "QUEEN2.JAS": "\r\n".join(["Look!*24A wooden box", *names]).encode(),
        "IAN7.DOG": dog(
            7, [(0x2A, "So?*03Well then, Ian?")], [(0x1F, "*FLNot today, Joe."), (0x20, "Aaaargh!")]
        ),
        "C2A.CUT": cut(
            [(0, "*"), (1, "Welcome to my shop...^_"), (2, "Hello."), (-2, "A voice off")]
        ),
    }
    path = bank(tmp_path / "queen.1c", files)
    main(["build", "queen", "--bank", str(path)])
    found = {
        u.id: u
        for split in ("train", "dev", "test", "test-scenes")
        if (cache / f"corpora/queen/{split}.jsonl").stat().st_size
        for u in read_manifest(find_manifest(f"queen/{split}"))
    }
    assert {i: (u.text, u.speaker, u.source) for i, u in found.items()} == {
        "audio/JOE00412.flac": ("A wooden box", "Brad Lavelle as Joe King", "queen:QUEEN2.JAS"),
        "audio/07002AJ2.flac": ("Well then, Ian?", "Brad Lavelle as Joe King", "queen:IAN7.DOG"),
        "audio/07XXXXP1.flac": ("Hello again.", "Barry James as Ian", "queen:IAN7.DOG"),
        "audio/C2A__021.flac": (
            "Welcome to my shop...",
            "Jon Coleman as Trader Bob",
            "queen:C2A.CUT",
        ),
        "audio/C2A__031.flac": ("Hello.", "Barry James as Pygmy Chief", "queen:C2A.CUT"),
    }
    assert found["audio/C2A__021.flac"].duration == pytest.approx(1.5, abs=1e-3)
    assert [u.id[6:14] for u in read_manifest(find_manifest("queen/test"))] == [
        "C2A__031",
        "07XXXXP1",
    ]
    told = capsys.readouterr().out
    for reason in ("1 noises", "1 not audio", "1 sounds or lines without", "1 in a voice"):
        assert f"left out: {reason}" in told


def test_what_is_no_bank_is_said_to_be_none(tmp_path):
    path = tmp_path / "queen.1c"
    path.write_bytes(b"RIFF" * 100)
    with pytest.raises(UsageError, match=r"queen\.1c: not a queen\.1c"):
        Bank(path)
    whole = bank(path, {"A.SB": b"12345678"}).read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UsageError, match="cut short"):
        Bank(path)


@pytest.mark.skipif(not queen.BANK.is_file(), reason="flight-of-the-amazon-queen is not installed")
def test_the_real_bank_gives_text_to_all_clips_that_speak():
    chosen, left_out = queen.choose_lines(Bank(queen.BANK))
    assert len(chosen) + len(left_out) == 6745
    assert left_out.count("sounds or lines without a text") == 201
    by_clip = {line.clip: line for line in chosen}
    assert by_clip["C75B_061"].text == "Why did you hit him?"
    assert by_clip["020020P1"].speaker == "AND"


def test_artists_and_scenes_are_held_out_whole():
    rng = random.Random(2)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnrst"]
    utterances = [
        Utterance(
            str(i),
            Path(f"/{i}"),
            " ".join(rng.sample(words, 5)),
            1.0,
            rng.choice(["Barry James as Ian", "Tom Hill as Skip", "Brad Lavelle as Joe King"]),
            f"queen:{rng.choice('ABDEFGHIJKLMNOPQRSTUVWXYZ')}{rng.randint(1, 3)}.DOG",
        )
        for i in range(1200)
    ]
    splits, leaked = queen.split(utterances)
    assert {u.speaker for u in splits["test"]} == {"Barry James as Ian"}
    assert leaked + sum(map(len, splits.values())) == 1200
    families = {name: {u.source[6] for u in splits[name]} for name in splits if name != "test"}
    assert not families["train"] & (families["dev"] | families["test-scenes"])
    assert not families["dev"] & families["test-scenes"]
    assert all(u.speaker != "Barry James as Ian" for name in families for u in splits[name])
