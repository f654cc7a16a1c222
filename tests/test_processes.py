"""Training in several processes: the same losses and gradients as in one, killed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from melprobe import train
from melprobe.errors import UsageError
from melprobe.training import processes
from melprobe.training.loop import trainable_parameters
from melprobe.training.processes import WHOLE, Losses, Share, make_accelerator
from melprobe.training.recipe_file import read_recipe
from melprobe.training.speech import SpeechTask
from tests.test_training import (
    ROOT,
    STEPS,
    losses,
    make_workshop,
    saved_step,
    wait_for_step,
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_workshop(folder)
    return folder


def words(workshop, name, parallel="ddp"):
    """Of the command that trains into `workshop/name`."""
    ctc = ["--ctc", "{layer: 1, steps: 99}"]
    out = ["--precision", "float32", "--out", str(workshop / name)]
    return [str(workshop / "recipe.yaml"), *ctc, *out, "--parallel", parallel]


def torchrun(workshop, name, parallel):
    """Two processes that train into `workshop/name`."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*run, "-m", "melprobe.train", *words(workshop, name, parallel)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def kill_at(step, running, out):
    """kill -9 of torchrun and of both its processes, once they have saved `step`."""
    wait_for_step(running, out, step)
    workers = psutil.Process(running.pid).children(recursive=True)
    for process in (psutil.Process(running.pid), *workers):
        process.send_signal(signal.SIGKILL)
    running.wait()
    psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 2
    assert step <= saved_step(out) < STEPS


def dev_losses(out):
    lines = (out / "last" / "log.jsonl").read_text().splitlines()
    return [line["dev_loss"] for line in map(json.loads, lines) if "dev_loss" in line]


@pytest.fixture(scope="module")
def many(workshop):
    """Two processes, killed again and again: in parts twice, then each with the whole model, and at
    last in parts; in `many-then-one` a single process goes on after the first kill."""
    out = workshop / "many"
    kill_at(4, torchrun(workshop, "many", "fsdp"), out)
    shutil.copytree(out, workshop / "many-then-one")
    kill_at(6, torchrun(workshop, "many", "fsdp"), out)
    kill_at(8, torchrun(workshop, "many", "ddp"), out)
    running = torchrun(workshop, "many", "fsdp")
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    assert told.count("trained to step") == 1
    return out


def test_two_processes_killed_go_on_as_two_or_as_one_whatever_each_holds(workshop, many):
    train.main(words(workshop, "one"))
    train.main(words(workshop, "many-then-one"))
    one = workshop / "one"
    for out in (many, workshop / "many-then-one"):
        assert losses(out) == pytest.approx(losses(one), rel=1e-4)
        assert dev_losses(out) == pytest.approx(dev_losses(one), rel=1e-4)


def test_parts_are_saved_as_one_process_would_save_them(workshop, many):
    theirs = load_file(many / "last" / "adapter.safetensors")
    shutil.copytree(many, workshop / "ended")
    (workshop / "ended" / "last" / "adapter.safetensors").unlink()
    train.main(words(workshop, "ended"))  # has nothing left to do but save
    ours = load_file(workshop / "ended" / "last" / "adapter.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (many / "best" / "adapter.safetensors").exists()


def test_a_state_that_lost_a_part_is_one_line(workshop, many):
    shutil.copytree(many, workshop / "lost")
    first, _ = sorted((workshop / "lost" / "state").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(UsageError, match=r"state: damaged .*parts of it are missing"):
        train.main(words(workshop, "lost"))


def shared_losses(task, step, n, monkeypatch):
    """Losses and gradients of `n` processes on a step's batch, averaged over them."""
    counts = [[] for _ in range(n)]
    for kept in (True, False):  # first what each has, then with the sum over all
        totals, gradients = {}, {}
        for rank in range(n):
            numbers = iter([] if kept else map(sum, zip(*counts, strict=True)))

            def all_reduce(count, rank=rank, numbers=numbers, kept=kept):
                counts[rank].append(count.item()) if kept else count.fill_(next(numbers))

            monkeypatch.setattr(processes.distributed, "all_reduce", all_reduce)
            monkeypatch.setattr(processes.distributed, "get_world_size", lambda: n)
            found, moved = own_losses(task, step, Share(rank, n))
            for sums, values in ((totals, found), (gradients, moved)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value / n
    return totals, gradients


def own_losses(task, step, share):
    _, batch = next(iter(task.batches(step, share)))
    task.model.zero_grad()
    task.heads.zero_grad()
    found = Losses(task, share)(dict(batch), step)
    found["train_loss"].backward()
    trainable = trainable_parameters(task).items()
    moved = {name: p.grad.clone() for name, p in trainable if p.grad is not None}
    return {name: loss.detach() for name, loss in found.items()}, moved


@pytest.fixture(scope="module")
def all_losses(workshop):
    """A task that has every kind of loss."""
    teacher = SpeechTask(read_recipe(workshop / "recipe.yaml", {"seed": "7"}))
    for name, weight in teacher.model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            torch.nn.init.normal_(weight, std=0.2)
    (workshop / "teacher").mkdir()
    teacher.save(workshop / "teacher", teacher.tensors(), [])
    changes = {
        "precision": "float32",
        "model.init": str(workshop / "teacher"),
        "ctc": "{layer: 1, steps: 99}",
        "distil": f"{{teacher: {workshop / 'teacher'}, layer: 1, steps: 99}}",
        "augment.frequency_warp": "[0.9, 1.1]",
        "data.copy_share": "0.5",
    }
    return SpeechTask(read_recipe(workshop / "recipe.yaml", changes))


@pytest.mark.parametrize("n", [2, 20])  # of 20 most are idle
@pytest.mark.parametrize(
    ("first", "made"),
    [
        (0, {"phones"}),
        (2, {"phones", "tokens"}),
        (4, {"nll", "ctc", "distil", "phones", "tokens"}),
        (4, {"copied"}),
    ],
    ids=["phones", "tokens", "text", "copies"],
)
def test_gradients_of_shares_average_to_those_of_the_batch(all_losses, first, made, n, monkeypatch):
    step = next(
        step
        for step, batch in all_losses.batches(first)
        if ("input_features" in batch) == (made != {"copied"})
    )
    one, its = own_losses(all_losses, step, WHOLE)
    many, theirs = shared_losses(all_losses, step, n, monkeypatch)
    assert made <= one.keys() == many.keys() and theirs.keys() == its.keys()
    for name, loss in one.items():
        assert many[name].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name, gradient in its.items():
        assert (theirs[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_shares_are_the_batch_and_nothing_twice():
    for clips in (1, 2, 7):
        shares = [Share(rank, 3) for rank in range(3)]
        busy = [share.places(clips) for share in shares if not share.idle(clips)]
        assert sorted(place for own in busy for place in own) == list(range(clips))


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda **settings: alone)
    with pytest.raises(UsageError, match="2 processes were started, and accelerate sees 1"):
        make_accelerator(torch.device("cpu"), bf16=False, accumulate=1)
