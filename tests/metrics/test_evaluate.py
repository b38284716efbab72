from __future__ import annotations

import pytest

from lmleak.errors import LmleakError
from lmleak.metrics import prepare, score
from lmleak.records import Reconstruction, Reference

SCRIPT = """
import datasets
import evaluate

class Hits(evaluate.Metric):
    def _info(self):
        value = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references, weight=1.0):
        right = [p == r for p, r in zip(predictions, references)]
        return {"hits": weight * sum(right) / len(right), "count": len(right), "note": "text"}
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "hits").mkdir()
    path = tmp_path / "hits" / "hits.py"
    path.write_text(SCRIPT)
    return str(path.parent)


def test_a_local_script_scores_the_assigned_answers(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    truth = Reference(((1,), (2,)), ("one", "two"))
    made = Reconstruction(((2,), (1,)), ("two", "one"))
    metric = {"kind": "evaluate", "path": script, "options": {"weight": 0.5}}
    assert score(made, truth, [metric]) == {"hits": 0.5, "hits.count": 2.0}
    assert score(made, truth, [{**metric, "keep": ["hits"]}]) == {"hits": 0.5}
    with pytest.raises(LmleakError, match=r"returns .* not \['misses'\]"):
        score(made, truth, [{**metric, "keep": ["misses"]}])
    with pytest.raises(LmleakError, match="unexpected keyword argument 'wight'"):
        score(made, truth, [{**metric, "options": {"wight": 1}}])


def test_offline_the_message_names_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    with pytest.raises(LmleakError, match=r"cannot load path 'no-such-metric-here'.*folder or .py file"):
        prepare([{"kind": "evaluate", "path": "no-such-metric-here"}])
