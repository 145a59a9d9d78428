"""Everything that needs a GPU, in one command: tests, a memory checker, errors, timings, a picture.

    python benchmarks/gpu_check.py [--out FOLDER]

Builds the CUDA library first, where nvcc is. Writes `gpu_check.json`, `gpu_check.log` and
`roofline.png` to FOLDER, or `$OUT`, or `benchmarks/results`. Nothing has to be installed but torch,
triton, numpy, hypothesis, pytest and matplotlib; what is missing is left out and named. Ends with 0
only if all that ran passed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import grasp_kernels as gk  # noqa: E402
from grasp_kernels import native  # noqa: E402
from grasp_kernels.testing import orthonormal, project_fp64, project_torch  # noqa: E402

TESTS = [
    "tests/test_project.py",
    "tests/test_project_triton.py",
    "tests/test_projector.py",
    "tests/test_orthonormalize.py",
    "tests/test_orthonormalize_triton.py",
    "tests/test_autograd.py",
    "tests/test_dispatch.py",
    "tests/test_native.py",
]
SANITIZED = """
import torch, grasp_kernels as gk
from grasp_kernels.testing import orthonormal
for side, shape, d in (("right", (37, 300), 300), ("left", (300, 37), 300)):
    for dtype in (torch.float32, torch.bfloat16):
        T = torch.randn(*shape, device="cuda").to(dtype)
        C = torch.randn(*((12, 37) if side == "left" else (37, 12)), device="cuda")
        for name in NAMES:
            with gk.backend(name):
                gk.project_([T, T.clone()], orthonormal(d, 12).cuda(), C, side=side)
                gk.Projector([T], orthonormal(d, 12).cuda(), side=side, measure=True)()
big = torch.randn(1024, 1032, device="cuda").bfloat16()
for name in NAMES:
    with gk.backend(name):
        gk.project_(big, orthonormal(1032, 12).cuda())
        gk.project_(big, orthonormal(1024, 12).cuda(), side="left")
for name in set(NAMES) - {"cuda"}:  # more directions than stay in registers
    with gk.backend(name):
        gk.project_([big, big.float()], orthonormal(1032, 150).cuda())
for name in NAMES:
    with gk.backend(name):
        gk.orthonormalize_([torch.randn(130, 7, device="cuda"), torch.zeros(9, 3, device="cuda")])
torch.cuda.synchronize()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=Path(default))
    parser.add_argument("--limit", type=float, default=540, help="seconds; timings stop before it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this command checks what needs one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log = (options.out / "gpu_check.log").open("w")
    import bench_orthonormalize
    import bench_project
    import harness

    device = torch.device("cuda")
    found: dict = {"about": harness.about(device)}

    def keep(name: str, value) -> None:
        found[name] = value
        harness.write_json(options.out / "gpu_check.json", found)
        print(f"[{time.monotonic() - started:4.0f} s] {name}")
        harness.show(value if isinstance(value, list) else [value])

    keep("build", build(log))
    names = ["triton"] + ([] if native.missing() else ["cuda"])
    keep("backends", {"run": names, "cuda": native.missing() or "loaded"})
    keep("errors", errors(device, names))
    keep("tests", pytest(log))
    keep("sanitizer", sanitizer(log, names))
    keep("copy_GBps", {"copy": harness.copy_bandwidth(device) / 1e9})
    for name, part in (
        ("project", bench_project.matrices),
        ("lists", bench_project.lists),
        ("orthonormalize", bench_orthonormalize.measure),
    ):
        for backend in reversed(names):
            quick = time.monotonic() - started > options.limit - 180
            with gk.backend(backend):
                keep(f"{name}_{backend}", part(device, quick))
    if importlib.util.find_spec("matplotlib"):
        picture(found, options.out / "roofline.png")
    checks = ("build", "errors", "tests", "sanitizer")
    failed = [name for name in checks if not found[name]["passed"]]
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


def build(log) -> dict:
    if shutil.which("nvcc") is None:
        return {"passed": True, "left_out": "nvcc is not on the PATH"}
    major, minor = torch.cuda.get_device_capability()
    os.environ |= {"GRASP_CUDA": "1", "GRASP_CUDA_ARCHS": f"{major}{minor}{'a' * (major == 9)}"}
    done = _run([sys.executable, "setup.py", "build_ext", "--inplace"], log)
    return {"passed": done.returncode == 0, "said": done.stderr[-500:] if done.returncode else ""}


def errors(device: torch.device, names: list[str]) -> dict:
    """Largest error against fp64 over the largest of PyTorch's own, by backend, dtype and side."""
    worst: dict[str, float] = {}
    for backend, side in product(names, ("right", "left")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for n, d, k in ((1000, 4096, 16), (333, 1000, 7), (64, 14336, 64)):
                T = torch.randn(*((d, n) if side == "left" else (n, d)), device=device).to(dtype)
                U = orthonormal(d, k).to(device)
                exact = project_fp64(T, U, None, side)
                with gk.backend(backend):
                    ours = (gk.project(T, U, side=side).double() - exact).abs().max()
                theirs = (project_torch(T, U, None, side).double() - exact).abs().max()
                name = f"{backend} {side} {str(dtype).removeprefix('torch.')}"
                worst[name] = max(worst.get(name, 0.0), float(ours / theirs))
    return {"passed": max(worst.values()) <= 2, "over_pytorch": worst}


def pytest(log) -> dict:
    missing = [m for m in ("pytest", "hypothesis") if importlib.util.find_spec(m) is None]
    if missing:
        return {"passed": True, "left_out": f"not installed: {', '.join(missing)}"}
    done = _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], log)
    last = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    return {"passed": done.returncode == 0, "summary": last[-1] if last else done.stdout[-300:]}


def sanitizer(log, names: list[str]) -> dict:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": True, "left_out": "compute-sanitizer is not on the PATH"}
    results = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c"]
        command.append(f"NAMES = {names}\n{SANITIZED}")
        done = _run(command, log)
        results[check] = done.returncode
    return {"passed": not any(results.values()), "exit_codes": results}


def _run(command: list[str], log) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    log.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}\n")
    log.flush()
    return done


def picture(found: dict, path: Path) -> None:
    """Each shape's share of the copy bandwidth: 1 is the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found.get("project_cuda", []) + found["project_triton"]
    labels = []
    for r in rows:
        m, n = r["shape"]
        labels.append(f"{r['backend'].split()[0]} {r['side']} {m}×{n} {r['dtype']} k={r['k']}")
    figure, axes = pyplot.subplots(figsize=(7, 0.36 * len(rows) + 1), layout="constrained")
    axes.barh(labels, [r["share"] for r in rows], color="#2a6f97")
    for i, r in enumerate(rows):
        axes.plot(r["share"] / r["over"]["addmm_"], i, "k|", ms=12)
    axes.axvline(1, color="#444", lw=1)
    axes.set(xlabel="share of copy bandwidth (bar: ours, tick: addmm_)", xlim=(0, 1.1))
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
