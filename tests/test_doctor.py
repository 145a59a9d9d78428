"""What is wrong on a machine is found, said with what to do, and mended where it is asked for."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as t

from grasp import Guard
from grasp.bases import cache
from grasp.guard.frozen import FREE
from grasp.model import hollow, inspect, load_model
from grasp.study import checkup, model_map
from grasp_kernels import native
from tests.models import FAMILIES, PROMPTS, build, with_lora
from tests.test_cli import grasp

ROOT = Path(__file__).parent.parent
LLAMA_70B = t.LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "cache"


def said(found=None) -> str:
    return "\n".join(f"{f.what} {f.do} {f.command}" for f in checkup.checkup(found))


def commands(monkeypatch, fails=False) -> list[list[str]]:
    """What would be run."""
    ran: list[list[str]] = []

    def run(command, **options):
        ran.append(command)
        return SimpleNamespace(returncode=int(fails), stdout="", stderr="no such thing\n")

    monkeypatch.setattr(checkup.subprocess, "run", run)
    return ran


def test_nothing_is_wrong_here(monkeypatch):
    monkeypatch.setattr(checkup, "driver", lambda: False)
    assert not [f for f in checkup.checkup() if not f.note]
    assert "Nothing is wrong." in grasp("doctor").stdout
    about = json.loads(grasp("doctor", "--json").stdout)
    assert all(f["note"] and f["done"] is None for f in about["findings"])


def test_the_newest_torch_that_is_tried_is_the_one_that_tests_run_with():
    lines = (ROOT / "constraints.txt").read_text()
    assert f"torch=={checkup.NEWEST_TRIED}." in lines
    assert checkup.wanted()["torch"] == "2.11" and "peft" in checkup.wanted()


@pytest.mark.parametrize(("there", "what"), [(None, "is missing"), ("0.9.1", "0.9.1 is too old")])
def test_packages(monkeypatch, there, what):
    known = checkup.installed
    monkeypatch.setattr(checkup, "installed", lambda n: there if n == "peft" else known(n))
    ran = commands(monkeypatch)
    (finding,) = [f for f in checkup.checkup() if "peft" in f.what]
    assert what in finding.what and not ran
    assert finding.command.startswith("pip install") and "'peft>=0.18'" in finding.command
    done = grasp("doctor", "--fix")
    (command,) = ran
    assert command[-2:] == ["peft>=0.18", f"torch=={torch.__version__}"]  # torch stays
    assert "Did -m pip install" in done.stdout
    commands(monkeypatch, fails=True)
    said = " ".join(grasp("doctor", "--fix").stdout.split())  # as wide as the terminal is
    assert "which failed: no such thing" in said


def test_an_older_torch_is_named_and_never_replaced(monkeypatch):
    known = checkup.installed
    monkeypatch.setattr(checkup, "installed", lambda n: "2.4.0" if n == "torch" else known(n))
    ran = commands(monkeypatch)
    assert "torch 2.4.0 is too old; 2.11 or newer is needed" in said()
    grasp("doctor", "--fix")
    assert not ran


def test_bitsandbytes_is_a_note(monkeypatch):
    known = checkup.installed
    monkeypatch.setattr(checkup, "installed", lambda n: None if "bits" in n else known(n))
    assert "load_in_4bit and load_in_8bit need it" in said()
    assert "Nothing is wrong." in grasp("doctor").stdout


@pytest.mark.parametrize(
    ("cuda", "hidden", "what"),
    [
        (None, None, "this torch is built for processors alone"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES='' hides the GPU"),
        ("12.8", None, "torch's CUDA 12.8 finds no GPU"),
    ],
)
def test_a_driver_without_an_accelerator(monkeypatch, cuda, hidden, what):
    monkeypatch.setattr(checkup, "driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert what in said()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as `_kernels` asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")

    def of(capability, missing="the library is not built"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(native, "missing", lambda: missing)
        return list(checkup._kernels())

    return of


def test_kernels_beside_a_gpu(gpu, monkeypatch):
    (old,) = gpu((7, 5))
    assert old.note and "capability 7.5, and the kernels need 8.0" in old.what
    assert gpu((8, 0)) == [] and gpu((9, 0), missing=None) == []
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    (toolkit,) = gpu((9, 0))
    assert "Install the CUDA toolkit" in toolkit.do and toolkit.mend is None
    monkeypatch.setattr(checkup.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(native, "built", lambda: True)
    ran = commands(monkeypatch)
    (broken,) = gpu((9, 0), missing="it does not load")
    assert not broken.note and broken.command.startswith("GRASP_CUDA=1 pip install")
    assert "Did setup.py build_ext --inplace" in broken.mend() and ran[0][1] == "setup.py"
    known = checkup.installed
    monkeypatch.setattr(checkup, "installed", lambda n: None if n == "triton" else known(n))
    (triton,) = gpu((8, 0))
    assert "triton is missing" in triton.what and "pip install 'triton'" in triton.command


def filled(cached: Path) -> list[Path]:
    with Guard(with_lora(build()), reference=PROMPTS, tokens=2, rank=0):
        pass
    return sorted(cached.rglob("*.safetensors"))


def test_what_is_kept_of_starts(cached):
    files = filled(cached)
    whole = sum(f.stat().st_size for f in files)
    assert checkup.size(whole) in said() and str(cached) in said()
    first, second, *others = files
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    long_ago = time.time() - 100 * 86400
    os.utime(second, (long_ago, long_ago))
    part = others[0].with_name(f".{others[0].name}.abc")
    part.write_bytes(b"half")
    assert [f.name for f in cache.survey(90).damaged] == [first.name]  # it may be being written
    os.utime(part, (long_ago, long_ago))
    text = said()
    assert "2 files are damaged or were never finished" in text
    assert "1 files" in text and "served no start for 90 days" in text
    grasp("doctor")
    assert first.exists() and second.exists() and part.exists()
    done = grasp("doctor", "--fix")
    assert "Removed 2 files" in done.stdout and "Removed 1 files" in done.stdout
    assert sorted(cached.rglob("*.safetensors")) == others and not part.exists()
    assert filled(cached) == files and not cache.survey(90).damaged


def test_a_start_that_takes_a_part_up_makes_it_young(cached):
    files = filled(cached)
    for file in files:
        os.utime(file, (0, 0))
    assert len(cache.survey(90).unused) == len(files)
    filled(cached)
    assert not cache.survey(90).unused


def test_a_build_that_was_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    part = tmp_path / "_native.so.part"
    part.write_bytes(b"half")
    assert "was cut off and left _native.so.part" in said()
    (tmp_path / "other").touch()
    grasp("doctor", "--fix")
    assert not part.exists() and (tmp_path / "other").exists()


def test_a_projection_that_is_wrong_clears_what_triton_compiled(monkeypatch, tmp_path):
    from grasp_kernels import selftest

    def wrong(T, basis, **options):
        return T

    monkeypatch.setattr(selftest, "project", wrong)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "triton" / "kernel").mkdir(parents=True)
    assert grasp("doctor").returncode == 1 and (tmp_path / "triton").exists()
    done = grasp("doctor", "--fix")
    assert done.returncode == 1 and not (tmp_path / "triton").exists()
    assert "Removed what Triton had compiled" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_model_is_understood_as_a_whole_one(family, tmp_path):
    model = build(family)
    model.config.save_pretrained(tmp_path)
    made = hollow(str(tmp_path))
    assert inspect(made).describe() == inspect(model).describe()
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in made.parameters()) == count


def test_a_model_of_any_size_is_mapped_without_its_weights(tmp_path):
    LLAMA_70B.save_pretrained(tmp_path)
    found = model_map.mapped(str(tmp_path))
    assert found.parameters == pytest.approx(70.6e9, rel=1e-3) and found.blocks == 80
    kinds = {k.name: (k.role, k.count, k.d_out, k.d_in) for k in found.covered}
    assert kinds["mlp.up_proj"] == ("indirect writer", 80, 28672, 8192)
    assert kinds["self_attn.o_proj"] == ("writer", 80, 8192, 8192)
    assert found.memory["64 free"] == 80 * 4 * FREE * (3 * 8192 + 28672)  # four inputs a block
    assert found.default == "64 free" and found.memory["tracked"] > 50e9
    assert any(f.what.startswith(f"{tmp_path} takes about 141 GB") for f in checkup._room(found))


def test_memory_is_what_a_guard_takes():
    model, _ = load_model("organism")
    found = model_map.mapped("organism")
    reference = torch.randint(3, 60, (40, 5)).tolist()
    with Guard(with_lora(model), reference=reference, tokens=2, free_rank=FREE) as guard:
        kept = {g.basis.data_ptr(): g.basis.nbytes for g in guard.guarded if g.share is not None}
    assert sum(kept.values()) == found.memory["64 free"] and found.default == "tracked"
    assert sum(k.count for k in found.covered) == 28


def test_experts_and_what_is_left_out(tmp_path):
    config = t.Qwen3MoeConfig(
        num_hidden_layers=2, num_experts=8, hidden_size=64, moe_intermediate_size=32
    )
    config.save_pretrained(tmp_path)
    found = model_map.mapped(str(tmp_path))
    kinds = {k.name: (k.role, k.count, k.d_out, k.d_in) for k in found.covered}
    assert kinds["experts.gate_up_proj"] == ("expert", 16, 64, 64)
    assert kinds["experts.down_proj"] == ("expert", 16, 64, 32)
    assert {"routers", "embeddings", "head", "norms"} <= {what for what, _ in found.left_out}


def test_the_map_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = grasp("doctor", "--model", "organism")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    assert "no weights are loaded" in done.stdout and "indirect writer" in done.stdout
    about = json.loads(grasp("doctor", "--json", "--model", "organism").stdout)
    assert about["model"]["covered"][0]["name"] and about["model"]["memory"]["frozen"] == 0


def test_little_room(monkeypatch):
    found = model_map.mapped("organism")
    assert not list(checkup._room(found))
    weights = found.memory["weights in bfloat16"]
    beside = sum(found.memory[k] for k in (found.lora, "outputs", found.default))
    monkeypatch.setattr(checkup, "free_memory", lambda: (weights + beside - 1, "memory"))
    (finding,) = checkup._room(found)
    assert "In 4 bits it takes about" in finding.do and "--load_in_4bit" in finding.command
    monkeypatch.setattr(checkup, "free_memory", lambda: (beside, "memory"))
    (finding,) = checkup._room(found)
    assert "It does not fit here, in 4 bits either" in finding.do and finding.command is None
    monkeypatch.setattr(checkup, "free_memory", lambda: (10**12, "memory"))
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    (finding,) = checkup._room(found)
    assert "1 kB of disk is free" in finding.what
