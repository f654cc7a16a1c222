"""Recordings of any rate and format become 16 kHz mono, and bad ones say where and why."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from melprobe.audio.load import BadAudio, load_usable, load_utterance, load_wave
from melprobe.corpus.manifest import Utterance


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def utterance(path: Path, seconds: float = 1.0) -> Utterance:
    return Utterance(path.name, path, "a tone", seconds, where="planted.jsonl:7")


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("cd.wav", 44_100, 2, "PCM_16"),
        ("phone.wav", 8_000, 1, "ULAW"),
        ("float.wav", 48_000, 6, "FLOAT"),
        ("studio.flac", 96_000, 1, "PCM_24"),
        ("music.ogg", 22_050, 2, "VORBIS"),
        ("game.mp3", 11_025, 1, "MPEG_LAYER_III"),
        ("own.wav", 16_000, 1, "PCM_16"),
    ],
)
def test_any_format_becomes_the_same_16_khz_mono_tone(tmp_path, name, rate, channels, subtype):
    wave = np.tile(tone(rate)[:, None], channels)
    soundfile.write(tmp_path / name, wave, rate, subtype)
    loaded = load_wave(tmp_path / name, expected_seconds=1.0)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - 16_000) <= 16_000 * 0.05
    spectrum = np.abs(np.fft.rfft(loaded[1000:15_000] * np.hanning(14_000)))
    assert np.argmax(spectrum) * 16_000 / 14_000 == pytest.approx(440, abs=1.2)
    assert np.sqrt(np.mean(loaded[2000:14_000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.stack([tone(16_000), 0 * tone(16_000)], 1), 16_000)
    assert np.abs(load_wave(tmp_path / "two.wav")).max() == pytest.approx(0.15, abs=1e-3)


def _plant(folder: Path) -> dict[str, bytes | None]:
    """File name to content (None: no file), each bad in its own way."""
    good = tone(16_000)

    def encoded(name: str, wave: np.ndarray, subtype: str) -> bytes:
        soundfile.write(folder / name, wave, 16_000, subtype)
        return (folder / name).read_bytes()

    half = np.where(np.arange(16_000) < 8000, good, np.nan)
    flac = encoded("x.flac", good + np.random.default_rng(0).normal(0, 0.1, 16_000), "PCM_16")
    wav = encoded("x.wav", good, "PCM_16")
    mp3 = encoded("x.mp3", good, "MPEG_LAYER_III")
    ogg = encoded("x.ogg", good, "VORBIS")
    return {
        "missing.wav": None,
        "empty.wav": b"",
        "header.wav": wav[:44],
        "page.wav": b"<html>not found</html>" * 50,
        "short.flac": flac[: len(flac) // 2],
        "short.wav": wav[: len(wav) // 2],
        "short.mp3": mp3[: len(mp3) // 2],
        "short.ogg": ogg[:-200],
        "long.wav": encoded("u.wav", np.tile(good, 2), "PCM_16"),
        "cancel.wav": encoded("t.wav", np.stack([good, -good], 1), "PCM_16"),
        "silent.wav": encoded("y.wav", 0 * good, "PCM_16"),
        "nan.wav": encoded("z.wav", half, "FLOAT"),
        "infinite.wav": encoded("w.wav", np.nan_to_num(half, nan=np.inf), "FLOAT"),
        "loud.wav": encoded("s.wav", 32768 * good, "FLOAT"),
        "one.wav": encoded("v.wav", np.full(1, 0.5), "PCM_16"),
    }


REASONS = {
    "missing.wav": "missing",
    "empty.wav": "empty",
    "header.wav": "cut short: 0.00 s of the 1.00 s that the manifest states",
    "page.wav": "not audio",
    "short.flac": "cut short",
    "short.wav": "cut short: 0.50 s of the 1.00 s that its header states",
    "short.mp3": "cut short",
    "short.ogg": "cut short: it has no last page",
    "long.wav": "too long: 2.00 s, but the manifest states 1.00 s",
    "cancel.wav": "its channels cancel each other",
    "silent.wav": "silent",
    "nan.wav": "NaN",
    "infinite.wav": "infinite",
    "loud.wav": "samples reach 1e+04 times full scale",
    "one.wav": "cut short",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_bad_recording_names_its_line_its_file_and_the_reason(tmp_path, name):
    content = _plant(tmp_path)[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadAudio) as error:
        load_utterance(utterance(path))
    message = str(error.value)
    assert message.startswith(f"planted.jsonl:7: {path}: ") and "\n" not in message
    assert REASONS[name] in message


@pytest.mark.parametrize("name", ["short.flac", "short.wav", "short.ogg", "short.mp3"])
def test_a_truncated_file_is_bad_without_a_manifest_too(tmp_path, name):
    (tmp_path / name).write_bytes(_plant(tmp_path)[name] or b"")
    with pytest.raises(BadAudio, match=rf"{name}: cut short"):
        load_wave(str(tmp_path / name))


@pytest.mark.parametrize("stated", [0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_states_no_length(tmp_path, stated):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000, "PCM_16")
    wav = (tmp_path / "a.wav").read_bytes()
    at = wav.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(wav[:at] + stated.to_bytes(4, "little") + wav[at + 4 :])
    assert len(load_wave(tmp_path / "a.wav")) == 16_000


def test_an_rf64_is_held_against_its_long_size(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000, "PCM_16", format="RF64")
    assert len(load_wave(tmp_path / "a.wav")) == 16_000
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-16_000])
    with pytest.raises(BadAudio, match="cut short"):
        load_wave(tmp_path / "a.wav")


def test_what_codecs_pad_and_trim_is_not_cut_short(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.96), 16_000)
    assert len(load_utterance(utterance(tmp_path / "a.wav"))) == 15_360
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.94), 16_000)
    with pytest.raises(BadAudio, match="cut short"):
        load_utterance(utterance(tmp_path / "a.wav"))


def test_a_clip_in_which_no_word_fits_is_bad(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, 0.04), 16_000)
    with pytest.raises(BadAudio, match=r"a\.wav: 0\.040 s is too short"):
        load_wave(tmp_path / "a.wav")


def test_skipping_lists_what_it_left_out_and_never_leaves_nothing(tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(16_000), 16_000)
    good, gone = utterance(tmp_path / "good.wav"), utterance(tmp_path / "gone.wav")
    usable, waves, left_out = load_usable([gone, good], "skip")
    assert usable == [good] and len(waves) == 1
    assert left_out == [f"planted.jsonl:7: {tmp_path / 'gone.wav'}: the file is missing"]
    with pytest.raises(BadAudio, match=r"gone\.wav"):
        load_usable([good, gone], "error")
    with pytest.raises(BadAudio, match="all 1 recordings are unusable"):
        load_usable([gone], "skip")
