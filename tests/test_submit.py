"""Training on a cluster: what each node is told to run."""

import subprocess
import sys

import pytest

from melprobe import submit
from melprobe.errors import UsageError


def test_every_node_meets_the_others_at_the_first():
    words = ["r.yaml", "--optim.lr", "1e-3"]
    first, second = (submit.torchrun(words, ["a", "b"], rank, 8, 29_500) for rank in (0, 1))
    assert " ".join(first[1:]) == (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr a "
        "--master-port 29500 -m melprobe.train r.yaml --optim.lr 1e-3"
    )
    assert [one for one in zip(first, second, strict=True) if one[0] != one[1]] == [("0", "1")]


def test_a_job_runs_torchrun_with_the_recipe_and_its_overrides(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: ran.append((command, how)))
    logs = ["--logs", str(tmp_path), "--cluster", "debug"]
    submit.main(["r.yaml", "--processes", "2", "--optim.lr", "1e-3", "--seed=1", *logs])
    ((command, how),) = ran
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[-6:] == ["-m", "melprobe.train", "r.yaml", "--optim.lr", "1e-3", "--seed=1"]
    assert how["check"] and int(how["env"]["OMP_NUM_THREADS"]) >= 1
    assert "job DEBUG_" in capsys.readouterr().out


def test_a_stopped_job_is_queued_again(monkeypatch):
    training = submit.Training(["r.yaml"], 2)
    assert training.checkpoint().function is training


def test_without_slurm_it_says_so(tmp_path):
    with pytest.raises(UsageError, match="--cluster slurm: Could not detect"):
        submit.main(["r.yaml", "--logs", str(tmp_path)])
