"""What README shows runs, and what it names is there."""

import re
from pathlib import Path

import pytest

from grasp import Subspaces
from grasp_kernels.testing import orthonormal
from tests.models import WIDTH, build, with_lora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_leads_with_the_two_commands():
    first = re.search(r"```(?:sh|bash)?\n(.*?)```", README, re.S).group(1)
    assert first.splitlines()[0].startswith("make demo")
    assert first.splitlines()[1].startswith("make test")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.M) and re.search(r"^test:", makefile, re.M)


def test_python_examples_run(tmp_path, monkeypatch):
    from transformers import Trainer
    from transformers.trainer_utils import set_seed

    from tests.test_trainer import PROMPTS, ROWS, arguments

    set_seed(0)
    monkeypatch.chdir(tmp_path)
    Subspaces.from_bases({0: orthonormal(WIDTH, 2)}).save("factor")
    names = {
        "model": with_lora(build()),
        "args": arguments(tmp_path),
        "rows": ROWS,
        "prompts": PROMPTS,
        "tokenizer": None,  # these prompts are token ids
        "Trainer": Trainer,
    }
    examples = blocks("python")
    assert examples
    for example in examples:
        names["model"] = with_lora(build())
        exec(example, names)


@pytest.mark.parametrize("path", re.findall(r"`((?:grasp|benchmarks|tests)/[\w/]*\.\w+)`", README))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_tree_lists_every_module():
    for package in ("grasp", "grasp_kernels"):
        for file in (ROOT / package).glob("*.py"):
            if not file.name.startswith("__"):
                assert file.stem in README, file


def test_names_no_machine():
    assert not re.search(r"/(work|root|tmp|home)/", README)
