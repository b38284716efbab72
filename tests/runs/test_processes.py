"""Kills, ranks and resumes with real processes: whatever happens, the same results as of one quiet run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lmleak.runs import cell_lines, read_reconstructions
from lmleak.runs.store import lines

SCRIPT = Path(__file__).with_name("processes.py")


def start(*command, **environment):
    home = str(SCRIPT.parents[2])
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    made = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = made.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(made.pid, signal.SIGKILL)  # the workers of a launcher too
        raise
    assert made.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    said = start(sys.executable, SCRIPT, "forks", folder)
    return folder, said


def results(folder):
    """All that must not depend on how often or on how many processes a run was started."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in cell_lines(folder)]


def recovered(folder):
    return [{key: value for key, value in line.items() if key != "time"} for line in read_reconstructions(folder)]


def units(folder, name="results"):
    return Counter((line["cell"], line["batch"]) for path in folder.glob(f"{name}-*.jsonl") for line in lines(path))


def test_the_quiet_run_is_worth_comparing_with(forks):
    whole = results(forks[0] / "whole")
    assert len(whole) == 40
    assert {line["status"] for line in whole} == {"ok", "no_signal"}
    assert any(line["scores"] and line["scores"]["exact_match"]["mean"] == 1 for line in whole)
    assert len({tuple(line["reference"]["texts"]) for line in recovered(forks[0] / "whole")}) == 2


def test_twenty_kills_change_nothing(forks):
    folder, said = forks
    kept = [int(line.split()[2]) for line in said.splitlines() if line.startswith("killed")]
    assert len(kept) == 20
    assert kept == sorted(kept)
    assert len(set(kept)) > 2
    assert kept[-1] < 40
    assert results(folder / "kills") == results(folder / "whole")
    assert recovered(folder / "kills") == recovered(folder / "whole")
    assert set(units(folder / "kills").values()) == {1}
    assert set(units(folder / "kills", "reconstructions").values()) == {1}


def test_a_killed_worker_loses_its_running_unit_only(forks):
    folder, said = forks
    kept = next(line for line in said.splitlines() if line.startswith("kept"))
    first, second = map(int, kept.split()[1:])
    assert second >= 2
    assert first + second < 40
    # Nothing that either rank had done was done again.
    assert set(units(folder / "workers").values()) == {1}
    assert results(folder / "workers") == results(folder / "whole")


def test_two_ranks_under_torchrun_give_the_results_of_one(forks, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    start(*launch, SCRIPT, "run", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert [sum(1 for _ in lines(tmp_path / "two" / f"results-{rank}.jsonl")) for rank in range(2)] == [20, 20]
    assert results(tmp_path / "two") == results(forks[0] / "whole")
    assert recovered(tmp_path / "two") == recovered(forks[0] / "whole")
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["status"] == "done"
    assert facts["processes"] == 2
