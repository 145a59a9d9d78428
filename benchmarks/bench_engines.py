"""A guarded run under each engine that spreads a model over processes: how exact, at what cost?

    python benchmarks/bench_engines.py [--only "FSDP2, bf16"] [--weights full] [--kills 2]

Of a small Llama, as a LoRA and as a full fine-tune of its blocks, with AdamW; by engine
(`engines.py`) and weights a line of `rows`:

    outputs, inputs   the largest ‖UᵀΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖, in fp64, from the guard's bases
                      and whole weights before and after
    certified         what `guard.certificate()` says got through, and whether it holds
    distance          of the weights from those of one process on the same global batches, over how
                      far that moved
    in_step           whether all processes end with the same weights and bases
    step_ms, guarded_ms   medians of steps without and with a guard that take turns, bases full
    load            the machine's load average over its cores just before: above 1 others ran too
    kills, resumed    SIGKILLs of all processes at random moments of a run with checkpoints, and
                      whether it came to the weights and the certificate of an unbroken one

All processes share this machine's cores, and each projects as it would on a GPU of its own.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from engines import ENGINES, ONE, Engine, own
from harness import about, show
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from grasp import Guard
from grasp.files import write_json

STEPS, EVERY, TIMED, ROWS, TOKENS = 12, 3, 10, 8, 24
SHAPES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SHAPES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = torch.randint(3, 64, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
GUARD = {"reference": PROMPTS, "tokens": 4, "read": 0.5, "rank": 4, "every": 1, "refresh": 2}


def build() -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES))
    for p in model.parameters():
        p.data.mul_(5 if p.ndim > 1 else 1)  # initial weights are small; so each part counts
    return model.requires_grad_(False)


def lora() -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(build(), config)


def frozen() -> nn.Module:
    """A must not ask for gradients when an engine takes the model over."""
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    return model


def full() -> nn.Module:
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_("layers" in name and p.ndim > 1)
    return model


WEIGHTS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "LoRA": (lora, GUARD | {"freeze_inputs": False}),
    "LoRA, few free": (lora, GUARD | {"free_rank": 6}),
    "LoRA, frozen": (frozen, GUARD | {"freeze_inputs": True}),
    "full": (full, GUARD),
}


def rows(n: int) -> dict[str, Tensor]:
    """This process's part of global batch n."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(3, 64, (ROWS, TOKENS), generator=generator)
    return own({"input_ids": ids, "labels": ids})


def train(engine: Engine, weights: str, folder: Path | None = None) -> dict:
    """A guarded run: from the newest checkpoint of a folder, or from the start."""
    make, options = WEIGHTS[weights]
    run = engine.start(make())
    before = run.whole()
    newest = folder and max(folder.glob("step-*/done"), key=_step, default=None)
    if newest:
        run.load(newest.parent / "checkpoint")
    guard = Guard(run.model, optimizer=run.optimizer, **options)
    guard.attach(newest and newest.parent / "guard.safetensors")
    for n in range(guard.steps, STEPS):
        run.step(rows(n))
        if folder and n % EVERY == EVERY - 1:
            _keep(run, guard, folder / f"step-{n + 1}")
    found = {"certificate": guard.certificate(), "before": before, "after": run.whole()}
    found["bases"] = guard.bases
    guard.detach()
    if engine is ONE and guard.frozen:  # which keep no basis: it is found apart, as if A trained
        with Guard(lora(), **options | {"freeze_inputs": False}) as tracked:
            found["inputs"] = {n: V for n, V in tracked.bases.items() if ".lora_A." in n}
    return found


def _step(done: Path) -> int:
    return int(done.parent.name.removeprefix("step-"))


def _keep(run, guard: Guard, to: Path) -> None:
    """What the marker `done` says is whole."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(to, ignore_errors=True)  # of a run that was killed while it wrote this
        to.mkdir(parents=True)
    if dist.is_initialized():
        dist.barrier()
    run.save(to / "checkpoint")
    if guard.split or first:
        guard.save(to / "guard.safetensors")
    if dist.is_initialized():
        dist.barrier()
    if first:
        (to / "done").touch()


def times(engine: Engine, weights: str) -> dict[str, float]:
    """Median milliseconds of steps without and with a guard, which take turns."""
    make, options = WEIGHTS[weights]
    plain, held = engine.start(make()), engine.start(make())
    taken: dict[str, list[float]] = {"step_ms": [], "guarded_ms": []}
    grown = options["rank"] * options["refresh"]
    with Guard(held.model, optimizer=held.optimizer, **options):
        for n in range(grown + TIMED):
            for name, run in (("step_ms", plain), ("guarded_ms", held)):
                began = time.perf_counter()
                run.step(rows(n))
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(found[grown:]) for name, found in taken.items()}


def through(found: dict, alone: dict) -> dict[str, float]:
    """The most of any ΔW that lies in a basis, from whole weights; frozen inputs' are one's."""
    before, after = (
        {n.removesuffix(".weight"): W.double() for n, W in found[key].items()}
        for key in ("before", "after")
    )
    most = {"outputs": 0.0, "inputs": 0.0}
    for name, basis in (found["bases"] | alone.get("inputs", {})).items():
        side = "inputs" if ".lora_A." in name or name.endswith("(inputs)") else "outputs"
        name = name.removesuffix(" (inputs)").removesuffix(".weight")
        D = after.get(name, 0) - before.get(name, 0)
        if ".lora_" in name:
            A, B = (
                name.replace(".lora_A.", x).replace(".lora_B.", x) for x in (".lora_A.", ".lora_B.")
            )
            D = after[B] @ after[A] - before[B] @ before[A]
        inside = D @ basis.double() if side == "inputs" else basis.double().mT @ D
        most[side] = max(most[side], float(inside.norm() / D.norm()))
    return most


def distance(alone: dict, found: dict) -> float:
    def norm(one: str, other: dict) -> float:
        squares = [(alone["after"][n] - W).square().sum() for n, W in other[one].items()]
        return float(sum(squares)) ** 0.5

    return norm("after", found) / norm("before", alone)


def start(work: Callable[[], object], count: int, out: Path) -> list[int]:
    """Processes that do some work together: copies of this one, which has imported all it needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    return [pid for rank in range(count) if (pid := _fork(work, rank, count, port, out))]


def _fork(work: Callable[[], object], rank: int, count: int, port: int, out: Path) -> int:
    if process := os.fork():
        return process
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    said = open(out / f"{rank}.log", "w")
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    code = 1
    try:
        if count > 1:
            dist.init_process_group("gloo")
        kept = out / f"{rank}.pt.part"
        torch.save(work(), kept)
        kept.rename(out / f"{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        said.flush()
        os._exit(code)


def together(work: Callable[[], object], count: int, out: Path) -> list:
    """What each of the processes found.

    Raises:
        RuntimeError: one failed; says where it told why.
    """
    failed = [os.waitpid(process, 0)[1] for process in start(work, count, out)]
    if any(failed):
        raise RuntimeError(f"a process failed; see {out}/*.log")
    return [torch.load(out / f"{rank}.pt") for rank in range(count)]


def killed(engine: Engine, weights: str, out: Path, takes: float, kills: int, draw) -> tuple:
    """What a run comes to that is killed so often at least, and how often it was.

    Raises:
        RuntimeError: a process failed by itself; says where it told why.
    """
    struck = 0
    while True:
        processes = start(lambda: train(engine, weights, out / "kept"), engine.processes, out)
        ends = time.monotonic() + draw.uniform(0.2, 0.9) * takes
        waiting = set(processes)
        while waiting and (struck >= kills or time.monotonic() < ends):
            ended = {p: found[1] for p in waiting if (found := os.waitpid(p, os.WNOHANG))[0]}
            if any(ended.values()):
                raise RuntimeError(f"a process failed; see {out}/*.log")
            waiting -= ended.keys()
            time.sleep(0.005)
        for process in waiting:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        struck += bool(waiting)
        if not waiting and struck < kills:  # it had ended: again, then
            shutil.rmtree(out / "kept")
        elif not waiting:
            return [torch.load(out / f"{r}.pt") for r in range(engine.processes)], struck


def same(one: dict, other: dict) -> bool:
    return all(
        torch.equal(T, other[key][n]) for key in ("after", "bases") for n, T in one[key].items()
    )


def measure(name: str, engine: Engine, weights: str, alone: dict, kills: int, runs: Path) -> dict:
    out, draw = runs / f"{name}-{weights}".replace(" ", "_"), random.Random(f"{name} {weights}")
    began = time.monotonic()
    first, *others = together(
        lambda: train(engine, weights, out / "whole"), engine.processes, out / "a"
    )
    takes = time.monotonic() - began
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    taken = together(lambda: times(engine, weights), engine.processes, out / "b")[0]
    (broken, *_), struck = killed(engine, weights, out / "c", takes, kills, draw)
    return {
        "engine": name,
        "processes": engine.processes,
        "weights": weights,
        **through(first, alone),
        "certified": first["certificate"]["through"],
        "holds": first["certificate"]["holds"],
        "distance": distance(alone, first),
        "in_step": all(same(first, other) for other in others),
        **taken,
        "load": load,
        "kills": struck,
        "resumed": same(first, broken) and first["certificate"] == broken["certificate"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", choices=ENGINES, action="append", help="an engine; may be several"
    )
    parser.add_argument("--weights", choices=WEIGHTS, action="append")
    parser.add_argument("--kills", type=int, default=2, help="of each, at least")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_engines"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    shutil.rmtree(options.runs, ignore_errors=True)
    chosen, kinds = options.only or list(ENGINES), options.weights or list(WEIGHTS)
    kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    found = [r for r in kept if r["engine"] not in chosen or r["weights"] not in kinds]
    for weights in kinds:
        (alone,) = together(lambda w=weights: train(ONE, w), 1, options.runs / f"one-{weights}")
        for name in (n for n in chosen if ENGINES[n].only in (None, weights)):
            row = measure(name, ENGINES[name], weights, alone, options.kills, options.runs)
            show([row])
            found.append(row)
            write_json(options.out, {"about": about(torch.device("cpu")), "rows": found})
    wrong = [r for r in found if not (r["holds"] and r["in_step"] and r["resumed"])]
    print(f"{len(found)} rows, {len(wrong)} wrong; {options.out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
