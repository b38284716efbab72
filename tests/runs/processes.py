"""Runs in processes of their own, to be killed. A script, because forks belong in a process that holds nothing else.

python processes.py forks FOLDER          FOLDER/whole: a run without a kill
                                          FOLDER/kills: 20 kills at seeded moments, then the run to its end
                                          FOLDER/workers: two ranks, one of them killed, then one process to the end
torchrun ... processes.py run FOLDER      the run, on as many ranks as there are
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
RECIPE = {
    "name": "forty",
    "model": {"kind": "bert", "weights": "random", "tokenizer": "bytes", "config": TINY, "device": "cpu"},
    "data": {"kind": "sample", "limit": 1, "max_length": 7},
    "select": {"components": ["attn_value"], "layers": [0]},
    "attack": {"kind": "span"},
    "metrics": ["token_accuracy", "exact_match"],
    "sweep": {"defense": [{"kind": "gaussian_noise", "std": 10.0**-k} for k in range(1, 21)], "seed": [0, 1]},
}


PACE = 0.1  #: seconds between the units of a run that is to be killed


def one(folder: Path) -> None:
    from lmleak.runs import run

    run(RECIPE, run_dir=folder, quiet=True)


def forked(folder: Path, pace: float = 0.0, **environment: str) -> int:
    """Starts `one` in a fork, so that 20 starts import torch once.

    A unit takes 5 ms on an idle machine: with a pause of `pace` seconds before each, a kill meets a run, not its end.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        from lmleak.runs import execute

        do = execute.do
        execute.do = lambda *args: (time.sleep(pace), do(*args))[1]
        one(folder)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)


def lines(folder: Path, rank: int = 0) -> int:
    path = folder / f"results-{rank}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(count: int, folder: Path, pid: int, rank: int = 0) -> None:
    # WNOWAIT leaves a child that has ended where it is: its number must not be another's when it is killed.
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while lines(folder, rank) < count and os.waitid(os.P_PID, pid, ended) is None:
        time.sleep(0.001)


def kills(folder: Path) -> None:
    choice = random.Random(7)
    for _ in range(20):
        before = lines(folder)
        pid = forked(folder, PACE)
        # Before the first unit of this start as often as after the first or the second.
        more = choice.randrange(3)
        if more:
            wait_for(before + more, folder, pid)
        time.sleep(choice.random() * (0.02 if more else PACE))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print("killed with", lines(folder), "done", flush=True)
    os.waitpid(forked(folder), 0)


def workers(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [forked(folder, PACE, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    wait_for(2, folder, ranks[1], rank=1)
    os.kill(ranks[1], signal.SIGKILL)
    os.waitpid(ranks[1], 0)
    os.kill(ranks[0], signal.SIGTERM)  # as torchrun does when a worker dies
    print("survivor ended with", os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1]))
    print("kept", lines(folder, 0), lines(folder, 1), flush=True)
    os.waitpid(forked(folder), 0)


def forks(folder: Path) -> None:
    os.waitpid(forked(folder / "whole"), 0)
    kills(folder / "kills")
    workers(folder / "workers")


if __name__ == "__main__":
    import torch

    from lmleak.config import cells, load_recipe
    from lmleak.runs.workbench import Workbench, check

    torch.set_num_threads(1)
    if sys.argv[1] != "run":
        # All that is imported on first use, so that no fork has to: 20 starts take 5 CPU seconds, not 40.
        bench, point = Workbench(), cells(load_recipe(RECIPE))[-1]
        check([point], bench)
        bench.attack(point, 0)
    {"forks": forks, "run": one}[sys.argv[1]](Path(sys.argv[2]))
