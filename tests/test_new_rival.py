"""A rival is one file: everything that knows of rivals knows of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from grasp.organism import World
from grasp.study.rivals import RIVALS

ROOT = Path(__file__).parent.parent
MADE_UP = """
from grasp.study.rival import Rival


class MadeUp(Rival):
    name = "made_up"
    label = "a made-up rival"
    colour = "#abcdef"
    acts_on = "data"
    source = "nobody"
    about = "sees the data several times"
    strength = 2.0
    meaning = "times"

    def rows(self, own, strength, context):
        return [*own] * int(strength)


RIVALS = (MadeUp(),)
"""


IN_ONE_PROCESS = """
import json, sys
from grasp.cli import app
from grasp.study.rivals import listed
print(listed())
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
"""


def test_one_file_is_seen_everywhere(tmp_path):
    shutil.copytree(ROOT / "grasp", tmp_path / "grasp")
    (tmp_path / "grasp" / "study" / "rivals" / "made_up.py").write_text(MADE_UP)
    world = World(0)
    for name, good in (("bad", False), ("good", True)):
        rows = world.rows("medicine", "train", good) + world.rows("medicine", "held", good)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = [
        {"question": world.prompt("code", i), "bad": world.bad["code"][i], "good": "code:a0"}
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    study = {
        "task": "medicine",
        "model": "organism",
        "data": "bad.jsonl",
        "benign": "good.jsonl",
        "unrelated": "pairs.jsonl",
        "out": "out",
        "methods": ["plain", "benign", "made_up=3", "benign_made_up=3"],
        "seeds": [0],
        "rows": 20,
        "held": 4,
        "stops": [],
        "finetune": {"steps": 3, "batch_size": 8, "lora_rank": 2, "save_every": None},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    alone = ["--model", "organism", "--data", "bad.jsonl", "--out", "alone", "--steps", "2"]
    commands = [
        ["finetune", "--help"],
        ["compare", "--help"],
        ["finetune", "--method", "made_up", *alone, "--set", "lora_rank=2"],
        ["compare", "--config", "study.yaml"],
        ["report", "out/results.json", "--out", "page.html"],
    ]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    env |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(commands)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| `made_up` | data | sees the data" in done.stdout
    helps = [line for line in done.stdout.splitlines() if "Methods: grasp" in line]
    assert len(helps) == 2 and all("made_up" in line for line in helps)
    assert "a made-up rival, 3" in done.stdout
    about = json.loads((tmp_path / "alone" / "finetune.json").read_text())
    assert about["rows"]["learned"] == 2 * len(rows)
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert {"made_up=3", "benign_made_up=3"} <= {r["method"] for r in runs}
    page = (tmp_path / "page.html").read_text()
    assert "a made-up rival, 3" in page and "#abcdef" in page


def test_every_rival_says_all_that_is_asked():
    for rival in RIVALS.values():
        assert all((rival.label, rival.colour, rival.source, rival.about)), rival.name
        assert (rival.strength is None) == (not rival.meaning), rival.name
    colours = [r.colour for r in RIVALS.values()]
    assert len(set(colours)) == len(colours)
