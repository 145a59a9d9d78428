"""Where the extras are not installed: what is missing and how to get it, and no traceback."""

import sys

import pytest

import grasp
from grasp import __main__ as command
from grasp.versions import lacking, wanted


@pytest.fixture
def bare(monkeypatch):
    """As after `pip install grasp-kernels`: peft is the first that is missed."""
    monkeypatch.setitem(sys.modules, "grasp.cli", None)
    monkeypatch.setattr(command, "lacking", lambda: ["peft", "typer"])

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["grasp", *words])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return stop.value.code

    return run


@pytest.mark.parametrize(
    "words, code", [((), 0), (("--help",), 0), (("finetune", "--help"), 0), (("finetune",), 1)]
)
def test_what_is_missing_is_said(bare, capsys, words, code):
    assert bare(*words) == code
    said = capsys.readouterr()
    where = said.err if code else said.out
    assert "Missing: peft, typer." in where and "pip install 'grasp-kernels[hf]'" in where
    assert "Traceback" not in said.err


def test_the_doctor_tries_the_kernels(bare, capsys):
    assert bare("doctor") == 1
    said = capsys.readouterr()
    assert "self-test    right in" in said.out and "torch " in said.out
    assert "Missing: peft" in said.err


def test_the_version_needs_nothing(bare, capsys):
    assert bare("--version") == 0
    assert capsys.readouterr().out == f"grasp-kernels {grasp.__version__}\n"


def test_another_fault_is_not_hidden(bare, monkeypatch):
    monkeypatch.setattr(command, "lacking", lambda: [])
    with pytest.raises(ModuleNotFoundError):
        command.main()


def test_names_of_the_package_say_it_too(monkeypatch):
    monkeypatch.setitem(grasp.PLACES, "Guard", "grasp.nowhere")
    monkeypatch.setattr(grasp, "lacking", lambda: ["peft"])
    with pytest.raises(ModuleNotFoundError, match=r"Guard needs peft.*grasp-kernels\[hf\]"):
        grasp.__getattr__("Guard")


def test_what_an_extra_asks_for():
    assert {"peft", "typer", "numpy"} <= wanted("hf").keys() and not lacking("hf")
    assert not {"peft", "typer", "numpy"} & wanted("gguf").keys()
