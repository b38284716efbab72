from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.runs.plan import Unit, deal, remaining
from lmleak.runs.store import Store, Tail, lines, plain, read


def line(cell, batch=0, status="ok", **more):
    return {"cell": cell, "batch": batch, "status": status, **more}


def fill(folder, *cells, rank=0):
    with Store(folder, rank) as out:
        for cell in cells:
            out.append(line(cell), {"cell": cell, "batch": 0, "reference": {}, "reconstruction": {}})


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_line_is_skipped_then_cut_off(tmp_path, cut):
    fill(tmp_path, "a", "b")
    path = tmp_path / "results-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read(tmp_path, "results")) == [("a", 0)]
    fill(tmp_path, "c")
    for name in ("results", "reconstructions"):
        text = (tmp_path / f"{name}-0.jsonl").read_text()
        # b's reconstruction was whole, but without b's result nothing vouches for it.
        assert [json.loads(each)["cell"] for each in text.splitlines()] == ["a", "c"]


def test_a_line_without_its_newline_was_never_committed(tmp_path):
    (tmp_path / "results-0.jsonl").write_bytes(b'{"cell": "a", "batch": 0, "status": "ok"}')
    assert read(tmp_path, "results") == {}
    with Store(tmp_path):
        pass
    assert (tmp_path / "results-0.jsonl").read_bytes() == b""


def test_a_damaged_line_in_the_middle_counts_as_not_done(tmp_path):
    fill(tmp_path, "a")
    with (tmp_path / "results-0.jsonl").open("ab") as file:
        file.write(b"\0\0\0\0\n[1, 2]\n{}\n")
    fill(tmp_path, "b")
    assert [key[0] for key in read(tmp_path, "results")] == ["a", "b"]


def test_an_answer_goes_before_a_failure_whatever_the_rank(tmp_path):
    for rank, status in ((1, "failed"), (0, "ok")):
        with Store(tmp_path, rank) as out:
            out.append(line("a", status=status))
    with Store(tmp_path, 2) as out:
        out.append(line("a", status="failed"))
    assert read(tmp_path, "results")["a", 0]["status"] == "ok"


def test_a_tail_sees_each_whole_line_once(tmp_path):
    tail = Tail(tmp_path)
    assert tail.poll() == []
    fill(tmp_path, "a", rank=1)
    assert [each["cell"] for each in tail.poll()] == ["a"]
    with (tmp_path / "results-1.jsonl").open("ab") as file:
        file.write(b'{"cell": "b", ')
        file.flush()
        assert tail.poll() == []
        file.write(b'"batch": 0}\n')
    fill(tmp_path, "c", rank=0)
    assert {each["cell"] for each in tail.poll()} == {"b", "c"}
    assert tail.poll() == []


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=5)


@settings(max_examples=50)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8))
def test_whatever_an_attack_says_is_strict_json(value):
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == plain(value)


def test_half_a_surrogate_pair_survives_the_disk(tmp_path):
    with Store(tmp_path) as out:
        out.append(line("a", reason="\ud83d"))
    assert next(lines(tmp_path / "results-0.jsonl"))["reason"] == "\ud83d"


def test_what_remains_is_what_has_no_answer():
    done = {("a", 0): line("a"), ("b", 0): line("b", status="failed"), ("b", 1): line("b", 1, status="no_signal")}
    assert remaining([1, 2, 1], ["a", "b", "c"], done) == [Unit(1, 0), Unit(2, 0)]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from("xyz")), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_every_unit_is_dealt_once_and_evenly(cells, ranks):
    units = [Unit(i, batch) for i, (count, _) in enumerate(cells) for batch in range(count)]
    hands = deal(units, [model for _, model in cells], ranks)
    assert sorted(unit for hand in hands for unit in hand) == units
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_a_model_stays_on_one_rank_where_that_is_even():
    units = [Unit(cell, batch) for cell in range(4) for batch in range(3)]
    hands = deal(units, ["x", "y", "x", "y"], 2)
    assert [{unit.cell for unit in hand} for hand in hands] == [{0, 2}, {1, 3}]


def test_cheap_and_dear_cells_meet_on_every_rank():
    units = [Unit(cell, batch) for cell in range(2) for batch in range(10)]
    hands = deal(units, ["x", "x"], 2)
    assert [[sum(unit.cell == cell for unit in hand) for cell in range(2)] for hand in hands] == [[5, 5], [5, 5]]


def test_evenly_every_cell_gets_a_batch_before_any_gets_two():
    units = [Unit(cell, batch) for cell in range(3) for batch in range(2)]
    (hand,) = deal(units, ["x", "x", "y"], 1, evenly=True)
    assert hand == [Unit(0, 0), Unit(1, 0), Unit(0, 1), Unit(1, 1), Unit(2, 0), Unit(2, 1)]
