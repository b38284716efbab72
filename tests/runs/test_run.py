"""What a run promises: resume, retry, refusal, one line a cell, and the folder it leaves."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from lmleak.errors import DataError, LmleakError, RunError, SelectionError
from lmleak.metrics import score
from lmleak.records import Reconstruction
from lmleak.runs import cell_lines, load_results, read_reconstructions, rescore, run
from lmleak.runs.folder import Lock, find


def boom(config, observation, generator):
    if config.strength == 2:
        raise ValueError("no \x1b[31mluck")
    return Reconstruction(((1, 2),), ("some text",))


def facts(result):
    return json.loads((result.path / "run.json").read_text())


def test_the_folder_and_what_is_in_it(recipe, puppet, tmp_path):
    result = run(recipe, root=tmp_path, quiet=True, argv=["lmleak", "run", "four"])
    assert re.fullmatch(r"four-\d{8}T\d{6}Z-[0-9a-f]{12}", result.path.name)
    names = {path.name for path in result.path.iterdir() if not path.name.startswith(".")}
    assert names == {"recipe.yaml", "run.json", "results-0.jsonl", "reconstructions-0.jsonl", "log.txt"}
    known = facts(result)
    assert known["status"] == "done"
    assert known["argv"] == ["lmleak", "run", "four"]
    assert {"python", "versions", "device", "threads", "started", "finished"} <= known.keys()
    assert known["selections"]["0"]["parameters"][0] == "bert.encoder.layer.0.attention.self.query.weight"
    assert (result.cells, result.units, result.ran, result.failed, result.exit_code) == (4, 8, 8, 0, 0)


def test_the_same_call_again_does_nothing(recipe, puppet, tmp_path, monkeypatch):
    first = run(recipe, root=tmp_path, quiet=True)
    before = (first.path / "results-0.jsonl").read_bytes()
    monkeypatch.setattr("lmleak.models.load_model", None)  # a finished run needs no model
    again = run(recipe, root=tmp_path, quiet=True)
    assert (again.path, again.ran, len(puppet.calls)) == (first.path, 0, 8)
    assert (first.path / "results-0.jsonl").read_bytes() == before
    assert len(facts(again)["starts"]) == 2


def test_fresh_starts_anew_and_deletes_nothing(recipe, puppet, tmp_path):
    first = run(recipe, root=tmp_path, quiet=True)
    second = run(recipe, root=tmp_path, quiet=True, fresh=True)
    assert second.path != first.path
    assert second.ran == 8
    assert run(recipe, root=tmp_path, quiet=True).path == second.path
    with pytest.raises(RunError, match="--fresh deletes nothing"):
        run(recipe, run_dir=first.path, quiet=True, fresh=True)


def test_a_failing_unit_is_recorded_and_retried(recipe, puppet, tmp_path):
    puppet.act = boom
    first = run(recipe, root=tmp_path, quiet=True)
    assert (first.status, first.exit_code, first.failed, first.ran) == ("failed", 1, 4, 8)
    failed = [line for line in cell_lines(first) if line["status"] == "failed"]
    assert [line["axes"]["attack.strength"] for line in failed] == [2, 2]
    assert failed[0]["scores"] is None
    assert failed[0]["reason"] == "ValueError: no ·[31mluck"
    assert "Traceback" in (first.path / "log.txt").read_text()
    puppet.act = lambda *_: Reconstruction(((1, 2),), ("some text",))
    second = run(recipe, root=tmp_path, quiet=True)
    assert (second.path, second.ran, second.exit_code) == (first.path, 4, 0)
    assert {line["status"] for line in cell_lines(second)} == {"ok"}


def test_fail_fast_stops(recipe, puppet, tmp_path):
    puppet.act = boom
    result = run(recipe, root=tmp_path, quiet=True, fail_fast=True)
    assert (result.ran, result.failed, result.exit_code) == (3, 1, 1)
    # The mark that stops the other ranks does not stop the next start.
    assert run(recipe, root=tmp_path, quiet=True).ran == 6


def test_ctrl_c_keeps_what_is_done(recipe, puppet, tmp_path):
    def interrupt(config, observation, generator):
        if len(puppet.calls) == 4:
            raise KeyboardInterrupt
        return Reconstruction(((1, 2),), ("some text",))

    puppet.act = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(recipe, root=tmp_path, quiet=True)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert len(load_results(folder)) == 3
    assert cell_lines(folder)[1]["batches"] == {"ok": 1, "missing": 1}
    assert run(recipe, root=tmp_path, quiet=True).ran == 5


def test_another_recipes_folder_is_refused_by_name(recipe, puppet, tmp_path):
    run(recipe, run_dir=tmp_path / "mine", quiet=True)
    other = {**recipe, "name": "other", "data": {**recipe["data"], "limit": 3}}
    with pytest.raises(RunError, match=r"another recipe, 'four' .* not 'other' .*data.limit 2 -> 3"):
        run(other, run_dir=tmp_path / "mine", quiet=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RunError, match=r"holds other files and no run.json"):
        run(recipe, run_dir=tmp_path / "photos", quiet=True)
    assert len(puppet.calls) == 8


def test_a_folder_in_use_is_refused(recipe, puppet, tmp_path):
    result = run(recipe, root=tmp_path, quiet=True)
    lock = Lock(result.path)
    lock.take()
    with pytest.raises(RunError, match="another run is working"):
        run(recipe, root=tmp_path, quiet=True)
    with pytest.raises(RunError, match="another run is working"):
        rescore(result)
    lock.release()
    assert run(recipe, root=tmp_path, quiet=True).ran == 0


@pytest.mark.parametrize(
    ("field", "value", "error", "says"),
    [
        ("select", {"target_modules": ["attention.self.qery"]}, SelectionError, "attention.self.qery"),
        ("data", {"kind": "local", "path": "no/such.tsv"}, DataError, "no/such.tsv"),
    ],
)
def test_what_is_wrong_is_known_before_anything_runs(recipe, puppet, tmp_path, field, value, error, says):
    recipe["sweep"].pop("select.layers")
    with pytest.raises(error, match=re.escape(says)):
        run({**recipe, field: value}, root=tmp_path / "runs", quiet=True)
    assert not puppet.calls
    assert not (tmp_path / "runs").exists()


def test_seeds_and_batches_are_not_both_split_between_processes(recipe, puppet, tmp_path, monkeypatch):
    shared = {**recipe, "attack": {"kind": "gradinversion", "across_processes": True}}
    shared["sweep"] = {"seed": [0, 1]}
    for main, error, says in ((True, RunError, "across_processes"), (False, SystemExit, "2")):
        two = SimpleNamespace(num_processes=2, is_main_process=main)
        monkeypatch.setattr("lmleak.runs.execute.ranks.join", lambda two=two: two)
        with pytest.raises(error, match=says):
            run(shared, root=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_cannot_be_had_stops_all(recipe, puppet, tmp_path, monkeypatch):
    def missing(config):
        raise LmleakError("no such metric on this machine")

    monkeypatch.setattr("lmleak.metrics.exact_match.prepare", missing, raising=False)
    with pytest.raises(LmleakError, match="metrics: no such metric"):
        run(recipe, root=tmp_path, quiet=True)
    assert not puppet.calls


def test_a_layer_out_of_range_in_one_point_of_the_sweep_stops_all(recipe, puppet, tmp_path):
    recipe["sweep"]["select.layers"] = [[0], [7]]
    with pytest.raises(SelectionError, match="7"):
        run(recipe, root=tmp_path, quiet=True)
    assert not puppet.calls


def test_data_that_changed_under_a_run_is_refused(recipe, puppet, tmp_path):
    table = tmp_path / "lines.csv"
    table.write_text("text,label\none two three,0\nfour five six,1\n")
    recipe["data"] = {"kind": "local", "path": str(table), "limit": 2}
    puppet.act = boom
    run(recipe, root=tmp_path / "runs", quiet=True)
    table.write_text("text,label\none two three,0\nfour five seven,1\n")
    with pytest.raises(RunError, match=r"data: not what it was when this run began .* --fresh"):
        run(recipe, root=tmp_path / "runs", quiet=True)


def test_json_lines_one_a_cell_each_when_it_is_done(recipe, puppet, tmp_path, capsys):
    puppet.act = lambda config, *_: Reconstruction(
        ((1, 2),), ("some text",), details={"loss": math.nan, "tensor": torch.ones(2)}
    )
    result = run(recipe, root=tmp_path, quiet=True, json_lines=True)
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert printed == cell_lines(result)
    assert list(printed[0])[:8] == ["cell", "status", "reason", "axes", "select", "scores", "privacy", "seconds"]
    assert printed[0]["axes"] == {"select.layers": [0], "attack.strength": 1}
    assert list(printed[0]["scores"]) == ["token_accuracy", "exact_match"]
    assert printed[0]["scores"]["exact_match"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert printed[0]["seconds"].keys() >= {"attack_cpu", "total"}
    first = json.loads((result.path / "results-0.jsonl").read_text().splitlines()[0])
    assert first["details"] == {"loss": None, "tensor": [1.0, 1.0]}
    run(recipe, root=tmp_path, quiet=True, json_lines=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == printed


def test_no_answer_has_no_scores(recipe, puppet, tmp_path):
    puppet.act = lambda config, *_: Reconstruction(
        ((1,),), ("x",), status="no_signal" if config.strength == 2 else "ok", reason="flat"
    )
    line = cell_lines(run(recipe, root=tmp_path, quiet=True))[1]
    assert (line["status"], line["reason"], line["scores"]) == ("no_signal", "flat", None)


def test_settings_meet_the_same_batches_and_the_same_draws(recipe, puppet, tmp_path):
    drawn = {}

    def draw(config, observation, generator):
        released = next(iter(observation.gradients.values()))
        drawn.setdefault(config.strength, []).append((float(released.sum()), float(torch.rand(1, generator=generator))))
        return Reconstruction(((1,),), ("x",))

    puppet.act = draw
    recipe["defense"] = {"kind": "gaussian_noise", "std": 1.0}
    before = torch.get_rng_state()
    result = run(recipe, root=tmp_path, quiet=True)
    assert torch.equal(before, torch.get_rng_state())
    assert drawn[1] == drawn[2]
    assert len({number for _, number in drawn[1]}) == 2  # two batches, whatever the layer
    table = load_results(result)
    assert table.groupby("batch")["reference"].nunique().tolist() == [1, 1]


def test_results_as_a_table(recipe, puppet, tmp_path):
    table = load_results(run(recipe, root=tmp_path, quiet=True))
    assert len(table) == 8
    assert {"cell", "batch", "select.layers", "attack.strength", "status", "exact_match", "recovered"} <= set(table)
    assert set(table["recovered"]) == {"some text"}
    with pytest.raises(RunError, match="no run folder"):
        load_results(tmp_path)


def test_rescoring_uses_what_is_stored(recipe, puppet, tmp_path):
    result = run(recipe, root=tmp_path, quiet=True)
    stored = (result.path / "reconstructions-0.jsonl").read_bytes()
    assert rescore(result, ["rouge"]) == 8
    assert list(cell_lines(result)[0]["scores"]) == ["rouge1", "rouge2", "rougeL"]
    assert (result.path / "reconstructions-0.jsonl").read_bytes() == stored
    line = read_reconstructions(result)[0]
    truth = tuple(line["reference"]["texts"])
    from lmleak.records import Reference

    expected = score(Reconstruction((), ("some text",)), Reference((), truth), ["rouge"])
    assert load_results(result)["rouge1"][0] == expected["rouge1"]


def test_progress_goes_to_stderr_without_terminal_commands(recipe, puppet, tmp_path, capsys):
    puppet.act = lambda *_: Reconstruction(((1, 2),), ("a\x1b[2Jb",))
    run(recipe, root=tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "a·[2Jb" in err
    assert "done: 4 of 4 cells" in err


def test_the_folder_is_found_by_the_recipe_not_by_its_name(recipe, puppet, tmp_path):
    from lmleak.config import load_recipe

    result = run(recipe, root=tmp_path, quiet=True)
    assert find(load_recipe({**recipe, "name": "renamed"}), tmp_path) == result.path
    assert find(load_recipe({**recipe, "seed": 1}), tmp_path) is None
