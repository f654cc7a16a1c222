"""What goes wrong ends in one line that says what to do."""

import subprocess
import sys

import pytest

from melprobe.cache import cache_dir
from melprobe.errors import UsageError, check_writable, run


def complaint(capsys, error, **options):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run(main, **options)
    return left.value.code, capsys.readouterr().err


def test_what_a_user_can_mend_is_one_line(capsys, tmp_path):
    worker = "Caught in worker 0\nTraceback\nmelprobe.audio.load.BadAudio: a.wav: silent\n"
    assert complaint(capsys, UsageError(worker)) == (2, "melprobe: a.wav: silent\n")
    assert complaint(capsys, PermissionError(13, "Permission denied", "/x")) == (
        2,
        "melprobe: /x: Permission denied\n",
    )
    assert complaint(capsys, OSError(28, "No space left on device"))[0] == 2
    assert complaint(capsys, KeyboardInterrupt()) == (130, "melprobe: interrupted\n")
    assert "goes on from here" in complaint(capsys, KeyboardInterrupt(), resumable=True)[1]


def test_a_reader_that_has_enough_ends_a_command_quietly():
    code = "from melprobe.errors import run; run(lambda: print('x' * 100_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out x: this is a file"):
        check_writable(tmp_path / "file", "--out x")
    with pytest.raises(UsageError, match=r"--out x: no files can be written there \(Not a dir"):
        check_writable(tmp_path / "file" / "run", "--out x")


def test_a_cache_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("MELPROBE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="set MELPROBE_CACHE to a folder"):
        cache_dir("corpora")
