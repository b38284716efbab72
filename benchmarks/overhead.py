"""What a sweep costs beyond its work: 1,000 cells of one tiny batch each; the limit is 50 ms a cell.

    python benchmarks/overhead.py [CELLS]

Work is the CPU time that results call observe_cpu and attack_cpu. All the rest of run(), from validating the recipe to
closing run.json, is overhead, except loading what a first unit loads (a run of two cells, measured first).
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_MS = 50.0
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def study(cells: int) -> dict[str, Any]:
    """A recipe of `cells` cells."""
    return {
        "name": "overhead",
        "model": {"kind": "bert", "weights": "random", "tokenizer": "bytes", "config": TINY, "device": "cpu"},
        "data": {"kind": "sample", "limit": 1, "max_length": 8},
        "select": {"components": ["attn_value"], "layers": [0]},
        "attack": {"kind": "span"},
        "sweep": {"defense": [{"kind": "gaussian_noise", "std": 1e-9 * (k + 1)} for k in range(cells)]},
    }


def measure(cells: int, root: Path) -> dict[str, float]:
    """CPU and wall seconds of a run, of its work, and of starting it again when all is done."""
    from lmleak.config import load_recipe
    from lmleak.runs import load_results, run

    cpu, wall = time.process_time(), time.perf_counter()
    result = run(load_recipe(study(cells)), root=root, quiet=True, argv=[])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if result.failed:
        raise SystemExit(f"{result.failed} units failed; see {result.path / 'log.txt'}")
    table = load_results(result)
    again = time.perf_counter()
    run(load_recipe(study(cells)), root=root, quiet=True, argv=[])
    again = time.perf_counter() - again
    return {"cpu": cpu, "wall": wall, "work": float((table["observe_cpu"] + table["attack_cpu"]).sum()), "again": again}


def main() -> None:
    """Prints one JSON line; exits 1 above the limit."""
    import torch

    torch.set_num_threads(1)
    cells = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        first = measure(2, Path(folder, "first"))
        start = measure(2, Path(folder, "start"))
        full = measure(cells, Path(folder, "full"))
    over = {key: full[key] - full["work"] - (start[key] - start["work"]) for key in ("cpu", "wall")}
    line = {
        "cells": cells,
        "overhead_cpu_ms_a_cell": round(1000 * over["cpu"] / cells, 2),
        "overhead_wall_ms_a_cell": round(1000 * over["wall"] / cells, 2),
        "work_ms_a_cell": round(1000 * full["work"] / cells, 2),
        "first_start_s": round(first["wall"], 2),
        "resume_of_the_finished_run_s": round(full["again"], 2),
        "limit_ms": LIMIT_MS,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(line))
    sys.exit(line["overhead_wall_ms_a_cell"] > LIMIT_MS)


if __name__ == "__main__":
    main()
