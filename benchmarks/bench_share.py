"""Is the share that a guard states of each matrix's inputs on held-out prompts true?

    share = Σ ‖x̂ᵀ V‖² / Σ ‖x̂‖²,    x̂ = x / ‖x‖ of what the matrix takes in

Computed apart from the guard: plain PyTorch hooks on the model's own linear layers, a prompt at a
time, x̂ in fp32 and not rounded. Once on the prompts that the guard held out when it looked for V,
once on prompts that it never saw (prompts_facts.txt, with continuations of the model).

    python benchmarks/bench_share.py --model smollm2-135m-instruct
    python benchmarks/bench_share.py --model FOLDER_OF_QWEN2.5-CODER-1.5B-INSTRUCT --dtype bfloat16

Prints each form's largest difference and writes all of them, one line of JSON a model and form.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grasp import Guard, default_prompts, draw
from grasp.files import write_text
from grasp.model import load_model
from grasp.study.report import versions

HERE = Path(__file__).parent
EVERY = 5  # of so many distinct prompts the guard holds one out, as its documentation says
FREE = 64


def lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def energies(model: nn.Module, bases: dict[str, Tensor], rows: list[list[int]]) -> dict[str, float]:
    """Of each layer's inputs on some rows, the share of their energy in its basis `[d, k]`."""
    inside = dict.fromkeys(bases, 0.0)
    total = dict.fromkeys(bases, 0.0)
    layers = dict(model.named_modules())

    def hook(name: str):
        def see(module: nn.Module, args: tuple) -> None:
            x = torch.nn.functional.normalize(args[0].flatten(0, -2).float(), dim=1)
            inside[name] += float((x @ bases[name]).double().square().sum())
            total[name] += float(x.double().square().sum())

        return see

    hooks = [layers[name].register_forward_pre_hook(hook(name)) for name in bases]
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for each in hooks:
        each.remove()
    return {name: inside[name] / total[name] for name in bases}


def checked(model: nn.Module, tokenizer, free: int | None) -> dict:
    """What a guard states, and what is true, of every matrix."""
    began = time.perf_counter()
    guard = Guard(
        model, reference=default_prompts(), tokenizer=tokenizer, freeze_inputs=False,
        free_rank=free, rank=0, read=0.97,
    ).attach()  # fmt: skip
    reading = {
        g.name.partition(".lora_A")[0]: g for g in guard.guarded if g.trained.holds == "inputs"
    }
    said = {name: g.share for name, g in reading.items()}
    # W where few are free: what it holds of the inputs is what V does not.
    bases = {name: g.basis for name, g in reading.items()}
    rows = list(guard.growth.reference.rows())
    distinct = list(dict.fromkeys(prompt for prompt, _ in rows))
    held = set(distinct[EVERY - 1 :: EVERY])
    guard.detach()
    seconds = time.perf_counter() - began
    facts = (HERE / "prompts_facts.txt").read_text().splitlines()
    fresh = draw(model, [line for line in facts if line.strip()], tokenizer)
    model.eval()
    found = {
        "held_out": energies(model, bases, [whole for prompt, whole in rows if prompt in held]),
        "never_seen": energies(model, bases, [ids for ids, _ in fresh]),
    }
    true = {
        on: {name: 1 - s if reading[name].inside else s for name, s in shares.items()}
        for on, shares in found.items()
    }
    off = {name: abs(true["held_out"][name] - said[name]) for name in said}
    worst = max(off, key=off.get)
    return {
        "form": "tracked" if free is None else f"free_rank {free}",
        "matrices": len(said),
        "kept_as_W": sum(g.inside for g in reading.values()),
        "largest_difference": off[worst],
        "where": worst,
        "stated": {"least": min(said.values()), "mean": sum(said.values()) / len(said)},
        "never_seen": {
            "least": min(true["never_seen"].values()),
            "mean": sum(true["never_seen"].values()) / len(said),
        },
        "start_seconds": seconds,
        "each": {
            name: [round(v, 5) for v in (said[name], *(shares[name] for shares in true.values()))]
            for name in said
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--form", choices=("tracked", "free"), action="append")
    parser.add_argument("--out", type=Path, default=HERE / "results/share.json")
    options = parser.parse_args()
    shown = ["FOLDER" if "/" in a and a == options.model else a for a in ["python", *sys.argv]]
    for form in options.form or ("tracked", "free"):
        torch.manual_seed(0)
        model, tokenizer = load_model(options.model, options.dtype)
        about = {
            "command": " ".join(shown),
            "model": model.config.model_type,
            "parameters": model.num_parameters(),
            "dtype": options.dtype,
            "versions": versions(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        line = about | checked(lora(model), tokenizer, FREE if form == "free" else None)
        print(json.dumps({k: v for k, v in line.items() if k != "each"}, indent=1), flush=True)
        kept = options.out.read_text().splitlines() if options.out.exists() else []
        key = ("model", "parameters", "dtype", "form")
        kept = [old for old in kept if any(json.loads(old)[k] != line[k] for k in key)]
        write_text(options.out, "".join(f"{text}\n" for text in [*kept, json.dumps(line)]))


if __name__ == "__main__":
    main()
