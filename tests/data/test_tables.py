"""Reading tables: every format, the traps of each, and errors that name the file, the row or the columns."""

from __future__ import annotations

import json
import socket

import pytest

from lmleak import registry
from lmleak.errors import DataError

ROWS = [('Say "hi" to Ana.', 1), ('"Unclosed, he said.', 0), ("NA", 1), ("None", 0), ("Tab, comma; pipe |", 1)]


def read(kind="local", **fields):
    module = registry.load("data", kind)
    return module.load(module.Config(**fields))


def write(path, rows=ROWS):
    import csv

    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows, columns=["sentence", "label"]).to_parquet(path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"sentence": text, "label": label}) for text, label in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])
    else:
        path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_each_format_gives_the_same_rows(tmp_path, suffix):
    examples = read(path=write(tmp_path / f"rows.{suffix}"))
    assert list(zip(examples.texts, examples.labels, strict=True)) == ROWS
    assert examples.source["rows"] == 5


def test_local_files_need_no_network_and_leave_no_cache(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = write(tmp_path / "rows.tsv")
    assert len(read(path=path).texts) == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.tsv"]
    write(tmp_path / "rows.tsv", ROWS[:2])  # the same name with other contents is read anew
    assert len(read(path=path).texts) == 2


def test_progress_bars_stay_off_and_the_setting_is_put_back(tmp_path, capsys):
    import datasets

    before = datasets.utils.are_progress_bars_disabled()
    read(path=write(tmp_path / "rows.tsv"))
    assert datasets.utils.are_progress_bars_disabled() == before
    assert capsys.readouterr().err == ""


def test_a_split_may_be_sliced(tmp_path):
    assert read(path=write(tmp_path / "rows.tsv"), split="train[1:3]").texts == (ROWS[1][0], "NA")


def test_a_folder_gives_the_file_of_the_split(tmp_path):
    write(tmp_path / "in_domain_train.tsv")
    write(tmp_path / "in_domain_dev.tsv", ROWS[:2])
    assert len(read(path=str(tmp_path)).texts) == 5
    assert len(read(path=str(tmp_path), split="validation").texts) == 2
    with pytest.raises(DataError, match=r"no single file for split 'test'.*in_domain_dev\.tsv, in_domain_train\.tsv"):
        read(path=str(tmp_path), split="test")


def test_columns_are_guessed_only_when_one_is_plausible(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,sentence,label,source\n1,Hello there,1,web\n")
    assert read(path=str(path)).texts == ("Hello there",)
    path.write_text("question,answer\nWho?,Me\n")
    with pytest.raises(DataError, match=r"which column .* is the text.*question, answer"):
        read(path=str(path))
    assert read(path=str(path), text_column="answer").texts == ("Me",)
    assert read(path=str(path), text_column="answer").labels == ()
    with pytest.raises(DataError, match=r"no column 'anwser'; did you mean 'answer'"):
        read(path=str(path), text_column="anwser")


@pytest.mark.parametrize("label", ["pos", "", "1.5"])
def test_labels_that_are_no_integers_name_the_row(tmp_path, label):
    path = write(tmp_path / "rows.tsv", [("fine", 0), ("bad", label)])
    with pytest.raises(DataError, match=r"row 2 .* in 'label'"):
        read(path=path)


def test_rows_without_text_are_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [("fine", 0), ("  ", 1)])
    with pytest.raises(DataError, match=r"row 2 .* no text"):
        read(path=path)


def test_missing_empty_and_unreadable_files(tmp_path):
    path = write(tmp_path / "reviews.tsv")
    with pytest.raises(DataError, match=f"did you mean '{path}'"):
        read(path=str(tmp_path / "review.tsv"))
    with pytest.raises(DataError, match="nearest folder"):
        read(path=str(tmp_path / "nowhere" / "review.tsv"))
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(DataError, match="is empty"):
        read(path=str(tmp_path / "empty.tsv"))
    with pytest.raises(DataError, match="no rows"):
        read(path=write(tmp_path / "header_only.tsv", []))
    (tmp_path / "broken.parquet").write_text("not a table")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(path=str(tmp_path / "broken.parquet"))
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(DataError, match=r"none of \.tsv"):
        read(path=str(tmp_path / "rows.xlsx"))


def test_cola_is_read_with_and_without_its_header(tmp_path):
    body = "gj04\t1\t\tThe sailors rode the breeze.\ncj99\t0\t*\tAs you eat the most.\n"
    (tmp_path / "with.tsv").write_text("source\tlabel\tauthor_mark\tsentence\n" + body)
    (tmp_path / "without.tsv").write_text(body)
    found = [read("cola", path=str(tmp_path / name)) for name in ("with.tsv", "without.tsv")]
    assert found[0].texts == found[1].texts == ("The sailors rode the breeze.", "As you eat the most.")
    assert found[0].labels == found[1].labels == (1, 0)


@pytest.mark.parametrize("kind", ["cola", "sst2", "rotten_tomatoes"])
def test_hub_kinds_without_a_network_name_the_alternatives(kind):
    with pytest.raises(DataError, match="local file") as caught:
        read(kind)
    assert "kind: sample" in str(caught.value)


def test_an_unknown_hub_id_is_a_clear_error():
    with pytest.raises(DataError, match="someone/nothing"):
        read("hub", id="someone/nothing")


@pytest.mark.parametrize(
    ("kind", "path", "split", "rows"),
    [
        ("cola", "cola/in_domain_dev.tsv", "train", 527),
        ("cola", "cola", "train", 8551),
        ("sst2", "sst2/train.tsv", "train", 67349),
        ("rotten_tomatoes", "rotten_tomatoes", "train", 10662),
    ],
)
def test_real_copies_are_read_whole(shared, kind, path, split, rows):
    examples = read(kind, path=str(shared / "data/text" / path), split=split)
    assert len(examples.texts) == len(examples.labels) == rows
    assert set(examples.labels) == {0, 1}
