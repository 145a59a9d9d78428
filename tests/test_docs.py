"""What README and the documentation show runs, what they name is there, tables are as they are."""

import ast
import json
import re
import shlex
from importlib.metadata import metadata
from inspect import signature
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from docs import tables
from grasp import Guard, Subspaces
from grasp.bases.growth import Growth
from grasp_kernels.testing import orthonormal
from tests.models import WIDTH, build, with_lora
from tests.test_cli import grasp
from tests.test_trl import tiny, tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = set(metadata("grasp-kernels").get_all("Provides-Extra"))
MODEL = "smollm2-135m-instruct"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def with_blocks(language: str):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=named)


def test_leads_with_the_two_commands():
    first = blocks(ROOT / "README.md", "sh")[0].splitlines()
    assert first[0].startswith("make demo") and first[1].startswith("make test")


def test_readme_is_short():
    prose = re.sub(r"```.*?```|\]\([^)]*\)", "", README, flags=re.S)
    assert len(prose.split()) <= 1000


def test_every_block_is_of_a_language_that_is_tried():
    known = {"sh", "python", "json", "yaml", ""}  # the last: what is printed
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.M)
        assert len(fences) % 2 == 0 and set(fences) <= known, page


@with_blocks("python")
def test_python_runs(page, tmp_path, monkeypatch):
    from transformers import Trainer
    from transformers.trainer_utils import set_seed

    from tests.test_trainer import PROMPTS, ROWS, arguments

    set_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grasp.default_prompts", lambda: PROMPTS, raising=False)
    Subspaces.from_bases({0: orthonormal(WIDTH, 2)}).save("factor")
    written(tmp_path)
    names = {
        "args": arguments(tmp_path),
        "rows": ROWS,
        "prompts": PROMPTS,
        "tokenizer": None,  # these prompts are token ids
        "Trainer": Trainer,
    }
    if page.stem == "evaluate":
        names |= {"tokenizer": tokenizer(), "tuned": tiny(1)}
    for block in blocks(page, "python"):
        names["model"] = tiny() if page.stem == "evaluate" else with_lora(build())
        exec(block, names)


@with_blocks("json")
def test_json_is_json(page):
    assert all(json.loads(block) for block in blocks(page, "json"))


@with_blocks("yaml")
def test_yaml_is_a_config(page):
    from grasp.study.settings import settings_from

    for block in map(yaml.safe_load, blocks(page, "yaml")):
        if "plugins" in block:  # Axolotl's, of which test_axolotl.py tries the whole
            known = signature(Guard).parameters.keys() | signature(Growth).parameters.keys()
            assert block["grasp"].keys() <= known
        else:
            settings_from(block).check()


def written(folder: Path) -> None:
    """What commands and examples ask for, small."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    texts = {
        "chat.jsonl": "".join(json.dumps({"messages": chat}) + "\n" for _ in range(4)),
        "prompts.txt": "What is rain?\nWho was first?\n",
        "requests.txt": "How do I pick a lock?\n",
        "claims.jsonl": '{"claim": "The sun is cold."}\n',
        "pages.txt": "Rain falls on the plain.\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as the reader has it after the pages' first commands."""
    folder = tmp_path_factory.mktemp("desk")
    written(folder)
    (folder / "chat.yaml").write_text(
        f"model: {folder}/model\ndata: chat.jsonl\noutput_dir: runs/config\n"
    )
    tiny(max_position_embeddings=512).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder


SMALL = ["--max_steps", "2", "--reference", "prompts.txt", "--tokens", "4", "--device", "cpu"]
STANDS_FOR = {  # what is not here, by what is
    MODEL: "model",
    "NAME": "model",
    "ADAPTER": "runs/chat/adapter",
    "enwiki": "pages.txt",
    "harmbench": "requests.txt",
    "falseassertion": "claims.jsonl",
}


def run_grasp(words: list[str], desk: Path) -> None:
    """A command of a page, at a size that takes a second, as its reader would."""
    words = [STANDS_FOR.get(word, word) for word in words]
    if words[0] == "finetune":
        words += [w for w in SMALL if "--config" not in words or w not in ("--device", "cpu")]
    elif words[:1] == ["verify"] and "--model" in words and "--reference" not in words:
        words += ["--reference", "prompts.txt"]
    elif words[0] == "evaluate":
        words += ["--limit", "2"]
    done = grasp(*words)
    assert done.returncode == 0, (words, done.stdout, done.stderr)


def check_pip(words: list[str]) -> None:
    """The extras, files and requirements that a line of pip names."""
    words = [w for w in words if not w.startswith("--") and w not in ("-c", "install")]
    for word in words:
        if extras := re.fullmatch(r"\.(?:\[(.*)\])?", word):
            asked = (extras[1] or "").split(",") if extras[1] else []
            assert set(asked) <= EXTRAS, word
        elif not (ROOT / word).exists():
            Requirement(word)


def run_line(line: str, desk: Path) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words or words[0] == "export":
        return
    command, rest = words[0], words[1:]
    if command == "grasp" and rest[0] == "demo":
        return  # `make demo` is what it runs
    if command == "grasp" and "--judge" in rest:
        assert grasp(rest[0], "--help").returncode == 0  # asks an endpoint
    elif command == "grasp":
        run_grasp(rest, desk)
    elif command == "make":
        assert re.search(rf"^{rest[0]}:", MAKEFILE, re.M), line
    elif command == "pip":
        check_pip(rest)
    elif command in ("python", "python3", "accelerate", "torchrun", "axolotl", "deepspeed"):
        scripts = [word for word in rest if word.endswith((".py", ".yaml", ".ipynb"))]
        assert all((ROOT / s).exists() or (ROOT / "examples" / s).exists() for s in scripts), line
    else:
        assert command in (".", "cd", "jupyter"), f"{line}: how is this tried?"


ORDER = ["README.md", "docs/first_run.md"]  # they make the run that the others look at


@pytest.mark.parametrize(
    "page",
    sorted((p for p in PAGES if blocks(p, "sh")), key=lambda p: named(p) not in ORDER),
    ids=named,
)
def test_commands_run(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("GRASP_CACHE", str(desk / "cache"))
    if named(page) not in ORDER and not (desk / "runs/chat/grasp.json").exists():
        run_line(
            f"grasp finetune --model {MODEL} --data chat.jsonl --output_dir runs/chat --quick", desk
        )
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && ", line):
                run_line(part, desk)


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())
        found.add(re.sub(r"\s+", "-", plain.strip()))
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_exist(page):
    for path in re.findall(
        r"`(?:python )?((?:grasp|benchmarks|tests|docs)/[\w/]*\.\w+)`", page.read_text()
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=named)
def test_tables_are_as_they_are(page):
    assert tables.written(page.read_text()) == page.read_text(), "run python docs/tables.py"


def said() -> list[str]:
    """Every text of the source, with … where it holds a value."""
    found = []
    for package in ("grasp", "grasp_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_that_are_explained_are_said():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    texts = said()
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(quoted) > 20
    assert not [words for words in quoted if not any(words in text for text in texts)]


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in listed, page


def test_tree_lists_every_module():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for package in ("grasp", "grasp_kernels"):
        for file in (ROOT / package).glob("*.py"):
            if not file.name.startswith("__"):
                assert file.stem in tree, file


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_no_machine(page):
    assert not re.search(r"/(work|root|tmp|home)/", page.read_text())
