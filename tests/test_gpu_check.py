"""`gpu_check.py`, which nobody watches, keeps what it measured whatever its parts do.

Rehearsed without a GPU: tiny shapes, Triton's interpreter, and parts that fail on purpose.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu"]
FAILING = ("crashes", "hangs", "raises", "lacks", "odd")
MEASURING = (
    ("copies", "matrices", "lists", "variants"),
    ("counters", "leak", "step", "orthonormalize", "memcheck", "tests", "build"),
)
NCU = f"""#!{sys.executable}
import sys
print("==PROF== Connected to process 7")
print("case by the stub: 1000000")
print('"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum",'
      '"gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"')
print('"","","byte","byte","ns","%"')
print('"0","project_kernel","1,200,000","600,000","1,000","61.5"')
"""

SANITIZER = f"""#!{sys.executable}
import os, sys
print("========= COMPUTE-SANITIZER")
found = "racecheck" in sys.argv and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= ERROR SUMMARY: 1 error" if found else "========= ERROR SUMMARY: 0 errors")
sys.exit(int(sys.argv[sys.argv.index("--error-exitcode") + 1]) if found else 0)
"""


def started(
    out: Path, *arguments: str, path: Path | None = None, heard: bool = True, **env: str
) -> subprocess.Popen:
    """The command on its way; what it prints goes to a file, or to nobody at all."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    if heard:
        said = os.open(out.parent / f"{out.name}.said", os.O_WRONLY | os.O_CREAT)
    else:
        reader, said = os.pipe()
        os.close(reader)
    command = [*COMMAND, "--out", str(out), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
    os.close(said)
    return process


def parts(names) -> list[str]:
    return [argument for name in names for argument in ("--part", name)]


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def refusing(folder: Path, *packages: str) -> str:
    """A path on which these packages are found and can't be imported."""
    folder.mkdir()
    for name in packages:
        text = f"raise ModuleNotFoundError('refused', name={name!r})\n"
        (folder / f"{name}.py").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[int, list[dict], Path]]:
    """The exit status, lines and folder of each run; side by side, since most of it is imports."""
    root = tmp_path_factory.mktemp("gpu_check")
    (root / "tools").mkdir()
    executable(root / "tools" / "ncu", NCU)
    lean = refusing(root / "lean", "transformers", "peft", "matplotlib", "pytest")
    running = {
        "first": started(root / "first", *parts(MEASURING[0])),
        "second": started(root / "second", *parts(MEASURING[1]), path=root / "tools"),
        "failing": started(root / "failing", *parts(FAILING)),
        "short": started(root / "short", "--limit", "20", heard=False),
        "lean": started(root / "lean_run", *parts(("step", "tests")), PYTHONPATH=lean),
    }
    found = {}
    try:
        for name, process in running.items():
            status = process.wait(timeout=240)
            folder = root / ("lean_run" if name == "lean" else name)
            text = (folder / "gpu_check.jsonl").read_text()
            found[name] = (status, [loaded(line) for line in text.splitlines()], folder)
    finally:
        for process in running.values():
            process.terminate()
    return found


def loaded(line: str) -> dict:
    """Strict JSON; what a process left half-written as such."""

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    try:
        return json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError:
        return {"broken": line}


def ended(lines: list[dict], part: str) -> dict:
    (line,) = (f for f in lines if f.get("part") == part and "exit" in f)
    return line


def of(lines: list[dict], part: str) -> list[dict]:
    return [f for f in lines if f.get("part") == part and "exit" not in f and "begins" not in f]


def test_every_part_measures(runs):
    for name, chosen in zip(("first", "second"), MEASURING, strict=True):
        status, lines, folder = runs[name]
        assert status == 0, (folder.parent / f"{name}.said").read_text()[-2000:]
        for part in chosen:
            assert ended(lines, part)["reason"] is None
            figures = of(lines, part)
            assert figures and all(f["torch"] and f["device"] for f in figures)
            assert not any("failed" in f or f.get("passed") is False for f in figures)


def test_a_matrix_is_set_against_a_copy_and_rivals(runs):
    found = of(runs["first"][1], "matrices")
    for f in found:
        assert {"shape", "dtype", "k", "side", "spread", "chosen"} <= f.keys()
        assert set(f["share"]) == {"triton", "reference", "addmm_", "compile"}
        for rival, share in f["share"].items():
            assert share == pytest.approx(f["ms"]["copy"] / f["ms"][rival])
    assert {f["side"] for f in found} == {"right", "left"}


def test_lists_share_the_bases_of_one_input(runs):
    wide = of(runs["first"][1], "lists")[0]
    # Of the block's three maps two take in the same 32.
    assert wide["tensors"] == 3 and wide["basis_bytes"] == 4 * (32 * 20 + 48 * 24)
    assert {"ours", "addmm_ loop", "grouped", "foreach_mul_", "pinned, measured"} <= set(wide["ms"])


def test_variants_reach_the_kernel(runs):
    found = of(runs["first"][1], "variants")
    assert found[0]["variant"] is None and all(f["sound"] for f in found)
    changed = [f for f in found if f["variant"]]
    assert any("blocks" in f for f in changed) and not all("blocks" in f for f in changed)
    for f in changed:
        assert f["hooks"]
        for options in f["hooks"]:
            assert options["of"].endswith(".tiling")
            assert options["num_warps"] == f["variant"]["warps"]
            assert f["variant"]["stages"] in options.values()
            assert options.get("BD") == f["variant"]["BD"] or f["variant"]["BD"] is None


def test_counters_are_read_from_the_tools_table(runs):
    found = of(runs["second"][1], "counters")
    assert len(found) == 3
    assert found[0]["over_floor"] == pytest.approx(1.8)
    assert found[0]["GBps"] == pytest.approx(1800)
    assert found[0]["kernels"][0]["kernel"] == "project_kernel"


def test_leak_is_looked_at_with_all_shares_dtypes_and_sides(runs):
    found = of(runs["second"][1], "leak")
    seen = {(f["backend"], f["dtype"], f["side"], f["in_basis"]) for f in found}
    assert len(seen) == 2 * 3 * 2 * 3


def test_a_guarded_step_is_certified(runs):
    found = of(runs["second"][1], "step")
    assert next(f for f in found if f.get("what") == "model")["mean_rank"] > 0
    assert next(f for f in found if f.get("what") == "certificate")["passed"]
    assert {f["case"] for f in found if "over_plain" in f} == {"accumulation 1", "accumulation 4"}


def test_a_crash_keeps_what_was_known(runs):
    status, lines, _ = runs["failing"]
    assert status == 1
    assert [f["value"] for f in of(lines, "crashes") if "value" in f] == [1, 2]
    assert ended(lines, "crashes")["reason"] == "killed by SIGABRT"
    assert ended(lines, "crashes")["exit"] == -signal.SIGABRT
    assert [f for f in lines if "broken" in f]  # and its half line spoils no other


def test_a_hang_is_ended_with_its_children(runs):
    _, lines, folder = runs["failing"]
    last = ended(lines, "hangs")
    assert last["reason"] == "ended at its limit of 3 s" and last["exit"] is None
    assert 3 <= last["seconds"] < 20
    assert all(map(gone, of(lines, "hangs")[0]["pids"]))
    assert "in hangs" in (folder / "gpu_check.log").read_text()  # where it hung


def test_an_exception_costs_its_case_alone(runs):
    _, lines, _ = runs["failing"]
    found = of(lines, "raises")
    assert [f["case"] for f in found if "inverse" in f] == [0, 2]
    assert [f["failed"] for f in found if "case" in f and "failed" in f] == [
        "ZeroDivisionError: division by zero"
    ]
    assert "as it was asked to" in ended(lines, "raises")["reason"]


def test_what_the_sanitizer_finds_fails_the_part(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu.inside import Inside
    from gpu.memcheck import under

    path = tmp_path / "gpu_check.jsonl"
    path.touch()
    inside = Inside("memcheck", "cuda", path, seconds=60)
    sanitizer = executable(tmp_path / "compute-sanitizer", SANITIZER)
    under(inside, sanitizer, "memcheck", "triton")
    assert not inside.failed
    under(inside, sanitizer, "racecheck", "cuda")
    assert inside.failed
    clean, found = inside.lines.read()
    assert clean["passed"] and not found["passed"] and found["status"] == 9
    assert "========= ERROR SUMMARY: 1 error" in found["said"]


def test_later_parts_run_and_odd_figures_survive(runs):
    _, lines, _ = runs["failing"]
    assert ended(lines, "odd")["exit"] == 0
    (found,) = of(lines, "odd")
    assert [float(v) for v in found["values"][:2]] == [float("inf"), -float("inf")]
    assert float(found["of"]["ratio"]) != float(found["of"]["ratio"])
    assert found["values"][3] == 0.5


def test_a_missing_package_fails_nothing(runs):
    _, lines, _ = runs["failing"]
    said = "left out: no_such_package_anywhere is not installed"
    assert ended(lines, "lacks")["reason"] == said
    status, lines, folder = runs["lean"]
    assert status == 0
    assert {f["case"] for f in of(lines, "step") if "over_plain" in f} >= {"accumulation 4"}
    assert "pytest" in ended(lines, "tests")["reason"]
    assert not (folder / "roofline.png").exists()


def test_what_has_no_time_left_is_named_though_nobody_listens(runs):
    status, lines, folder = runs["short"]
    named = [f["part"] for f in lines if "exit" in f]
    assert named == [
        *("about", "build", "copies", "matrices", "lists", "counters", "variants", "leak", "step"),
        *("orthonormalize", "memcheck", "tests", "picture"),
    ]
    assert status == 0
    for part in ("build", "matrices", "tests"):
        assert ended(lines, part)["reason"].startswith("left out: ")
    assert "| matrices | 0 s | left out" in (folder / "gpu_check.md").read_text()


def test_summary_and_picture_come_from_the_lines_alone(runs, tmp_path):
    _, _, folder = runs["first"]
    assert (folder / "roofline.png").stat().st_size > 10_000
    assert "a rehearsal" in (folder / "gpu_check.md").read_text().lower()
    lines = tmp_path / "elsewhere.jsonl"
    lines.write_text((folder / "gpu_check.jsonl").read_text())
    command = [sys.executable, "benchmarks/gpu_check.py", "--picture", str(lines)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (tmp_path / "roofline.png").exists()
    assert (tmp_path / "elsewhere.md").read_text() in done.stdout
    assert "right 40×96 bfloat16 k 16" in done.stdout


def test_its_own_end_takes_the_part_along(tmp_path):
    process = started(tmp_path / "out", "--part", "waits")
    path = tmp_path / "out" / "gpu_check.jsonl"
    until = time.monotonic() + 60
    found: list[dict] = []
    while not found:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
        if path.exists():
            found = of([loaded(line) for line in path.read_text().splitlines()], "waits")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert all(map(gone, found[0]["pids"]))


def test_a_section_that_cant_be_summed_up_takes_no_other_along(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu.summary import text

    said = text(
        [
            {"part": "matrices", "share": {"triton": "NaN"}, "case": "a case"},
            {"part": "lists", "floor_ms": "wide"},
            {"part": "leak", "error_over_pytorch": "Infinity", "backend": "cuda", "case": "all"},
        ]
    )
    assert "| a case | nan% |" in said
    assert "lists: its lines can't be summed up" in said
    assert "PyTorch's own: inf (cuda, all)" in said


def test_a_part_again_replaces_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu.lines import Lines, read

    lines = Lines(tmp_path / "lines.jsonl")
    lines.path.touch()
    for value in (1, 2):
        for part in ("a", "b") if value == 1 else ("b",):
            lines.add(part=part, begins=True)
            lines.add(part=part, value=value)
    with lines.path.open("a") as file:
        file.write('5\n{"odd": 1}\n{"part": "b", "val')
    assert read(lines.path) == [{"part": "a", "value": 1}, {"part": "b", "value": 2}]


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "gpu_check.jsonl").write_text("of another day")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert (tmp_path / "gpu_check.jsonl").read_text() == "of another day"


def gone(pid: int) -> bool:
    """Ended; whoever adopted it may not have asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
