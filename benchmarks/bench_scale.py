"""What a guard costs beside a large model: memory and work of its start, and a step's time.

Tracked, with 64 directions left free, and frozen.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --model FOLDER_OF_QWEN2.5-CODER-1.5B-INSTRUCT --dtype bfloat16

The first counts, of models that are built without memory (on the meta device): bytes by the shapes
of what a guard keeps, operations by running as many tokens as the start looks at. The second starts
a guard on a real model twice, each in a process of its own, and times steps side by side.
One line of JSON for each.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from grasp import Guard, default_prompts
from grasp.bases.inputs import PER_WIDTH
from grasp.bases.spectrum import HELD, PANELS
from grasp.files import write_text
from grasp.guard.frozen import FILLED, FREE, bytes_of
from grasp.model import load_model, lora_factors
from grasp.study.report import versions

RANK = 32
MODELS = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "Qwen2.5-32B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8,
    ),
    "Llama-3.1-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
}  # fmt: skip
SEQUENCE = 128  # tokens of a prompt with its continuation, about
STEPS = 7


def lora(model: torch.nn.Module, rank: int = RANK) -> torch.nn.Module:
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def takes_in(name: str) -> str:
    """As `Matrix.takes_in` of Llama's and Qwen's names, where no token can be run."""
    place = name.partition(".lora_A")[0]
    return place if place.endswith("o_proj") else place.rpartition(".")[0]


def counted(name: str) -> dict:
    """Of a model on the meta device: what is kept, and what a start does."""
    config = MODELS[name]
    with torch.device("meta"):
        model = lora(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    factors = lora_factors(model)
    inputs = {(takes_in(n), A.shape[1]) for n, A, _, _ in factors}
    widest = max(d for _, d in inputs)
    tokens = PER_WIDTH * widest
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        ids = torch.zeros(1, SEQUENCE, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bfloat16, device="meta")
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    forward = flops.get_total_flops() / SEQUENCE * tokens
    kept = [(*i, 1) for i in inputs]
    A = sum(4 * A.numel() for _, A, _, _ in factors)
    per_input = {d: sum(1 for _, e in inputs if e == d) for _, d in inputs}
    return {
        "model": name,
        "weights_bytes_bf16": sum(2 * p.numel() for p in model.get_base_model().parameters())
        - sum(2 * T.numel() for _, A, B, _ in factors for T in (A, B)),
        "bases_bytes_tracked": bytes_of(kept),
        "bases_bytes_free": bytes_of(kept, free=FREE),
        "bases_bytes_frozen": 0,
        "gradient_and_adam_bytes_of_A_tracked": 3 * A,
        "gradient_and_adam_bytes_of_A_frozen": 0,
        "start_bytes": {
            "second moments": 4 * widest**2,
            "their factor": 2 * 4 * widest**2 // PANELS,
            "directions, tracked": 4 * 3 * widest * widest // 4,
            "directions, 64 free": 4 * 3 * widest * FREE,
            "held-out inputs": (2 + 4) * HELD * widest,
            "hidden states": 2 * 2 * tokens * config.hidden_size,
        },
        "start_tokens": tokens,
        "start_flops": {
            "forward": forward,
            "second moments": sum(n * tokens * d * d * 9 / 8 for d, n in per_input.items()),
            "directions, tracked": sum(n * _directions(d, d // 4) for d, n in per_input.items()),
            "directions, 64 free": sum(n * _directions(d, FREE) for d, n in per_input.items()),
        },
        "assumes": {
            "k": f"{FILLED} d",
            "free": FREE,
            "r": RANK,
            "lora": "fp32",
            "tokens": f"{PER_WIDTH} d",
        },
    }


def _directions(d: int, m: int) -> float:
    """Operations from second moments `[d, d]` to W `[d, m]`: a factor, two solves, QR, held-out."""
    return d**3 / 3 + 2 * d * d * m + 4 * d * m * m + d * m * m + 2 * HELD * d * m


def started(model: torch.nn.Module, tokenizer, freeze: bool, options: dict) -> tuple[Guard, dict]:
    """A guard attached, with the processor's and the wall's seconds, and how far memory went up."""
    for p in model.parameters():  # weights are read from disk when they are first used
        p.detach().sum()
    before = _resident(reset=True)
    cpu, wall = time.process_time(), time.perf_counter()
    guard = Guard(
        model, reference=default_prompts(), tokenizer=tokenizer, freeze_inputs=freeze, **options
    ).attach()
    peak = _resident(reset=False)
    return guard, {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "added_peak_bytes": peak - before,
    }


def _resident(reset: bool) -> int:
    """The most memory that this process held since the last reset, in bytes; Linux keeps it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def attach(options: argparse.Namespace) -> dict:
    """One start, in this process."""
    torch.manual_seed(0)
    model, tokenizer = load_model(options.model, options.dtype)
    model = lora(model)
    guard, found = started(model, tokenizer, options.form == "frozen", _reads(options))
    kept = {g.basis.data_ptr(): g.basis.nbytes for g in guard.guarded}
    shares = [f.share for f in guard.frozen] + [
        g.share for g in guard.guarded if g.share is not None
    ]
    ranks = [f.rank / f.trained.size for f in guard.frozen] + [
        g.leak()["rank"] / g.basis.shape[0] for g in guard.guarded if g.share is not None
    ]
    return found | {
        "bases_bytes": sum(kept.values()),
        "share_least": min(shares),
        "share_mean": sum(shares) / len(shares),
        "k_over_d_mean": sum(ranks) / len(ranks),
    }


def steps(options: argparse.Namespace) -> dict:
    """A step plain and guarded, in turns, on one model: the guard is attached and let go."""
    torch.manual_seed(0)
    model, tokenizer = load_model(options.model, options.dtype)
    model = lora(model).train()
    ids = torch.randint(100, 1000, (options.rows, SEQUENCE))
    guard, _ = started(model, tokenizer, options.form == "frozen", _reads(options))
    guard.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        guard.optimizer = optimizer
        state = guard.save(Path(folder) / "guard.safetensors")
        times: dict[str, list[float]] = {"plain": [], "guarded": []}
        began = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        step()
        for _ in range(STEPS):
            times["plain"].append(step())
            with torch.no_grad():  # a frozen A has to be what it was
                for p, value in began:
                    p.copy_(value)
            guard.attach(state)
            step()  # what is laid out at first
            times["guarded"].append(step())
            guard.detach()
    plain, guarded = median(times["plain"]), median(times["guarded"])
    return {"plain_seconds": plain, "guarded_over_plain": guarded / plain, "rows": options.rows}


def _reads(options: argparse.Namespace) -> dict:
    free = FREE if options.form == "free" else None
    return {"read_rank": options.read_rank, "free_rank": free, "rank": options.rank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="measure on this one; else count")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--form", choices=("free", "frozen", "tracked"), default="free")
    parser.add_argument("--read-rank", type=int)
    parser.add_argument("--rank", type=int, default=0, help="of bases of outputs that grow")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--part", choices=("attach", "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    options = parser.parse_args()
    if options.part:
        print(json.dumps({"attach": attach, "steps": steps}[options.part](options)))
        return
    shown = ["FOLDER" if a == options.model else a for a in ["python", *sys.argv]]
    about = {
        "command": " ".join(shown),
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if options.model is None:
        lines = [counted(name) for name in MODELS]
    else:
        lines = [_measured(options)]
    kept = options.out.read_text().splitlines() if options.out.exists() else []
    kept = [line for line in kept if json.loads(line)["command"] != about["command"]]
    for line in lines:
        print(json.dumps(line, indent=1))
    kept += [json.dumps(about | line) for line in lines]
    write_text(options.out, "".join(f"{line}\n" for line in kept))


def _measured(options: argparse.Namespace) -> dict:
    """Two starts, the second with what the first kept, then steps: each in its own process."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"GRASP_CACHE": cache}
        found = {"form": options.form, "dtype": options.dtype, "lora_rank": RANK}
        for name, part in (("first", "attach"), ("second", "attach"), ("steps", "steps")):
            command = [sys.executable, *sys.argv, "--part", part]
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, found[name], flush=True)
        sizes = [f.stat().st_size for f in Path(cache).rglob("*") if f.is_file()]
        return found | {"kept_on_disk_bytes": sum(sizes)}


if __name__ == "__main__":
    main()
