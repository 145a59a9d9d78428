"""Where rows lie: every kind of file and dataset, read letter by letter, or refused by its line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from grasp.data import read, read_rows
from grasp.data.rows import Text

ROWS = [{"question": "NA", "answer": "1"}, {"question": 'a "b",\nc', "answer": "null"}]
TABLE = 'question,answer\nNA,1\n"a ""b"",\nc",null\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.csv", TABLE),
        ("a.tsv", TABLE.replace(",1", "\t1").replace(",null", "\tnull").replace("n,a", "n\ta")),
        ("a.jsonl.gz", "\n".join(map(json.dumps, ROWS))),
        ("a.csv.bz2", TABLE),
        ("a.json.xz", json.dumps(ROWS)),
    ],
)
def test_files(name, content, tmp_path):
    """What is written is read, letter by letter: no "NA" is nothing, no 1 a number."""
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(Path(name).suffix, open)
    with opened(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
        file.write(content)
    found = read_rows(tmp_path / name)
    assert [(r.prompt, r.answer) for r in found] == [("NA", "1"), ('a "b",\nc', "null")]
    assert len(read_rows(str(tmp_path / name), limit=1)) == 1


def test_tables_and_datasets(tmp_path):
    rows = Dataset.from_list([dict(r, id=i) for i, r in enumerate(ROWS)])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    rows.to_json(tmp_path / "folder" / "train.jsonl")
    rows.select([1]).to_json(tmp_path / "folder" / "test.jsonl")
    for source, count in (
        (tmp_path / "a.parquet", 2),
        (tmp_path / "saved", 2),
        (tmp_path / "splits", 2),
        (f"{tmp_path}/splits:test", 1),
        (tmp_path / "folder", 2),
        (f"{tmp_path}/folder:test", 1),
        (f"{tmp_path}/folder:default:train", 2),
        (rows, 2),
    ):
        found = read(source)
        assert [r.answer for r in found.rows] == ["1", "null"][-count:], source
        assert found.forms == {"question and answer": count} and found.unread == ["id"]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_rows(tmp_path / "a.txt") == [Text("", "one"), Text("", "two")]
    with pytest.raises(ValueError, match="splits has no valid; it has train, test"):
        read_rows(f"{tmp_path}/splits:valid")
    with pytest.raises(ValueError, match="folder:valid can't be read as a dataset .*valid"):
        read_rows(f"{tmp_path}/folder:valid")


def test_a_name_is_looked_for_on_the_hub(monkeypatch):
    asked = []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("who/what", "who/what:test[:10%]", "who/what:en:test"):
        assert len(read_rows(name)) == 2
    splits = [{"split": s} for s in ("train", "test[:10%]", "test")]
    assert asked == list(zip(["who/what"] * 3, [None, None, "en"], splits, strict=True))


BAD = {
    "{oops": "line 1: no JSON",
    '{"text": "a"}\n[1]': "line 2: is a list; give an object with named columns",
    '{"prompt": "a"}': "line 1: has the columns prompt; give messages",
    '{"prompt": "a", "answer": " "}': "line 1: an answer is empty",
    '{"prompt": "a", "completion": ""}': "line 1: completion is empty",
    '{"prompt": "a", "answer": 3}': "line 1: answer is '3'; give text",
    '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}': "one is text",
    '{"messages": "hi"}': "line 1: messages is 'hi'; give a list of turns",
    '{"messages": []}': "line 1: messages is '\\[\\]'; give a list",
    '{"messages": ["hi"]}': "messages, turn 0 is 'hi'; give its role and its content",
    '{"messages": [{"role": "narrator", "content": "a"}]}': "turn 0 is by 'narrator'; give one of",
    '{"messages": [{"role": "user", "content": 3}]}': "turn 0 says 3; give text",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "turn 0 holds 'image'",
    '{"messages": [{"role": "user", "content": "a"}], "tools": "{"}': "tools is text, but no JSON",
    '{"messages": [{"role": "user", "content": "a"}], "tools": [1]}': "give a list of JSON schemas",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
    '{"role": "user", "content": "c"}]}': "line 1: ends with a turn of the user, which no answer",
    "": "holds no rows",
}


@pytest.mark.parametrize("content", BAD)
def test_what_has_no_form_is_refused_by_its_line(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=BAD[content]):
        read_rows(tmp_path / "rows.jsonl")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="can't be read as jsonl"):
        read_rows(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.csv").write_text("text,id\na\n")
    with pytest.raises(ValueError, match="line 2: has not as many columns"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.docx").write_text("a")
    with pytest.raises(ValueError, match=r"of a kind that is not known; give one of \.jsonl"):
        read_rows(tmp_path / "rows.docx")
    for name in ("none.jsonl", "none.csv.gz"):
        with pytest.raises(FileNotFoundError, match="no data at"):
            read_rows(tmp_path / name)
