"""The row store loses nothing that was committed, and never mixes two runs."""

import math
import signal
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import fields

import pandas as pd
import pytest

from melprobe.errors import UsageError
from melprobe.store import Key, Row, RowStore, provenance


def row(utterance: str = "a.flac", **changes) -> Row:
    plain = {
        "run": "r",
        "condition": "skip",
        "layer": "3",
        "utterance": utterance,
        "positions": "speech",
        "nll": 1.5,
        "answer_tokens": 4,
        "kl": 0.25,
        "reference": "one two",
        "hypothesis": "one",
        "substitutions": 0,
        "deletions": 1,
        "insertions": 0,
        "reference_words": 2,
        "seconds": 0.1,
    }
    return Row(**(plain | changes))


def test_rows_come_back_as_they_were_and_in_key_order(tmp_path):
    with RowStore(tmp_path / "rows.sqlite") as store:
        store.add([row("b.flac", block_influence=0.1), row("a.flac", hypothesis="ön“e\n")])
        frame = store.frame()
        store.export_parquet(tmp_path / "rows.parquet")
    assert list(frame.columns) == [field.name for field in fields(Row)]
    assert list(frame.utterance) == ["a.flac", "b.flac"]
    assert frame.hypothesis[0] == "ön“e\n"
    assert math.isnan(frame.block_influence[0]) and frame.block_influence[1] == 0.1
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), frame)


def test_an_empty_store_has_typed_columns(tmp_path):
    with RowStore(tmp_path / "rows.sqlite") as store:
        frame = store.frame()
    assert frame.empty and frame.nll.dtype == "float64" and frame.answer_tokens.dtype == "int64"


def test_a_key_is_kept_once(tmp_path):
    with RowStore(tmp_path / "rows.sqlite") as store:
        store.add([row(nll=1.0)])
        store.add([row(nll=2.0)])
        assert store.done() == {Key("r", "skip", "3", "a.flac")}
        assert list(store.frame().nll) == [2.0]


def test_nan_is_refused_and_takes_the_whole_batch_with_it(tmp_path):
    with RowStore(tmp_path / "rows.sqlite") as store:
        with pytest.raises(sqlite3.IntegrityError):
            store.add([row("a.flac"), row("b.flac", nll=math.nan)])
        assert store.done() == set()


def test_kill_9_while_writing_loses_nothing_committed(tmp_path):
    path = tmp_path / "rows.sqlite"
    writer = textwrap.dedent(
        f"""
        import sys
        from dataclasses import replace
        from pathlib import Path
        sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
        from test_store import row
        from melprobe.store import RowStore
        with RowStore(Path({str(path)!r}), {{"seed": 0}}) as store:
            for i in range(1_000_000):
                store.add([replace(row(f"{{i}}-{{j}}"), reference="word " * 200) for j in range(3)])
                print(i, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 40:
            process.send_signal(signal.SIGKILL)
            break
    last = int([line, *process.stdout][-1])
    assert process.wait() == -signal.SIGKILL
    with RowStore(path, {"seed": 0}) as store:
        done = {key.utterance for key in store.done()}
        assert {f"{i}-{j}" for i in range(last + 1) for j in range(3)} <= done
        assert len(done) % 3 == 0  # a batch is there whole or not at all
        store.add([row("after")])
        assert len(store.done()) == len(done) + 1
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "run" / "rows.sqlite"
    with RowStore(path, {"seed": 3, "positions": "text"}):
        pass  # and no rows: nothing was made with them
    long = ["clip"] * 99
    with RowStore(path, {"seed": 0, "positions": "speech", "limit": None, "clips": long}) as store:
        store.add([row()])
    with RowStore(path, {"clips": long, "limit": None, "positions": "speech", "seed": 0}):
        pass  # the same, in another order
    with pytest.raises(UsageError) as error:
        RowStore(path, {"seed": 1, "positions": "speech", "device": "cpu"})
    message = str(error.value)
    assert 'device = nothing there, "cpu" now' in message
    assert "seed = 0 there, 1 now" in message
    assert "limit = null there, nothing now" in message
    assert "other clips" in message and len(message) < 300
    assert "positions" not in message and "--out" in message and "\n" not in message


def test_a_file_that_is_no_store_is_a_usage_error(tmp_path):
    path = tmp_path / "rows.sqlite"
    path.write_text("not a database, but long enough to be read as one" * 30)
    with pytest.raises(UsageError, match="not a melprobe store"):
        RowStore(path)


def test_provenance_is_complete_and_repeats():
    first = provenance(seed=7, command=["python -m melprobe.ablate", "--data", "'a b'"])
    assert first == provenance(seed=7, command=["python -m melprobe.ablate", "--data", "'a b'"])
    assert first["command"] == "python -m melprobe.ablate --data 'a b'" and first["seed"] == 7
    assert {"python", "torch", "transformers", "melprobe"} <= first["versions"].keys()
    assert first["hardware"].keys() == {"platform", "cpu", "cores", "memory", "gpu"}
    assert first["hardware"]["cores"] >= 1
