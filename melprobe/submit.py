"""`python -m melprobe.submit RECIPE.yaml [--field value ...] --nodes N`: train on a Slurm cluster.

One Slurm task a node, which starts torchrun with a process for each GPU, or with `--processes` on
nodes without. Words that are none of the options below go to `melprobe.train`. A job that is
preempted or out of time is queued again and goes on from its last state.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melprobe.errors import Parser, UsageError, run


class Training:
    """What each node runs."""

    def __init__(self, words: Sequence[str], processes: int):
        self.words = list(words)
        self.processes = processes

    def __call__(self) -> None:
        import submitit

        node = submitit.JobEnvironment()
        number = int("".join(c for c in node.job_id if c.isdecimal())[-5:])
        port = 20_000 + number % 10_000  # jobs that share a node must not meet
        nodes = torchrun(self.words, node.hostnames, node.node, self.processes, port)
        cores = len(os.sched_getaffinity(0))
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self.processes))}
        subprocess.run(nodes, check=True, env=os.environ | threads)

    def checkpoint(self) -> Any:
        """submitit asks when the job is about to be stopped: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def torchrun(
    words: Sequence[str], hosts: Sequence[str], rank: int, processes: int, port: int
) -> list[str]:
    """The command of node `rank` among `hosts`."""
    place = ["--node-rank", str(rank), "--master-addr", hosts[0], "--master-port", str(port)]
    size = ["--nnodes", str(len(hosts)), "--nproc-per-node", str(processes)]
    run_it = [sys.executable, "-m", "torch.distributed.run", *size, *place]
    return [*run_it, "-m", "melprobe.train", *words]


def main(argv: Sequence[str] | None = None) -> None:
    """Submit the job, and say its number."""
    p = Parser(
        prog="python -m melprobe.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("recipe", type=Path)
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus", type=int, default=0, help="on each node")
    p.add_argument("--processes", type=int, help="on each node; one a GPU by default")
    p.add_argument("--cpus", type=int, default=8, help="cores on each node")
    p.add_argument("--hours", type=float, default=24)
    p.add_argument("--partition")
    p.add_argument("--logs", type=Path, default=Path("slurm"), help="submitit's folder")
    p.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm")
    options, overrides = p.parse_known_args(argv)
    try:
        import submitit
    except ImportError:
        raise UsageError("submitit is not installed: `pip install 'melprobe[clusters]'`") from None
    processes = options.processes or max(1, options.gpus)
    try:
        executor = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster)
    except RuntimeError as error:
        raise UsageError(f"--cluster {options.cluster}: {error}") from None
    executor.update_parameters(
        name="melprobe",
        nodes=options.nodes,
        tasks_per_node=1,
        gpus_per_node=options.gpus,
        cpus_per_task=options.cpus,
        timeout_min=round(60 * options.hours),
    )
    if options.partition:
        executor.update_parameters(slurm_partition=options.partition)
    job = executor.submit(Training([str(options.recipe), *overrides], processes))
    print(f"job {job.job_id}; its output: {options.logs.resolve()}")
    if options.cluster != "slurm":  # nobody else would wait for it
        job.result()


if __name__ == "__main__":
    run(main)
