"""How much of an update lies in what it is kept off, under each optimizer: measured, and certified.

    python benchmarks/bench_leak.py [--markdown] [--only AdamW,SOAP]

A tiny Llama is trained as a LoRA and as a full fine-tune of its blocks. Measured in fp64, from the
weights before and after and from the guard's bases, over all guarded matrices:

    outputs, inputs   the largest ‖UᵀΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖; None where no matrix has a basis
    at                whose is the larger of the two
    moved             the least ‖ΔW‖ / ‖W‖: at each step all of W is rounded, be ΔW ever so small

`guarded` is a run under the guard, and `certified` what `guard.certificate()` says of its weights,
with the bound of the matrix that lets most through. In `gradients_only` gradients are projected off
the final bases of that guard from the first step on, and nothing pins weights; a LoRA's A begins
off V, as the guard has it. PEFT's OSF (`osf`) works so too, and is measured against the singular
directions that it protects. An average of weights is judged in the model's place. Rows whose
package (schedulefree, pytorch_optimizer, bitsandbytes) is missing say "not installed".
"""

import argparse
import copy
import importlib
import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import about
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.osf.utils import decompose_weight_matrix
from peft.tuners.tuners_utils import BaseTunerLayer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

import grasp_kernels as gk
from grasp import Guard
from grasp.files import write_json

STEPS, RANK = 40, {"lora": 4, "osf": 8}
SHAPES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = torch.randint(3, 64, (12, 5), generator=torch.Generator().manual_seed(1)).tolist()
PACKAGES = ("transformers", "peft", "schedulefree", "pytorch_optimizer", "bitsandbytes")
AVERAGED_FROM = {"ema": 0, "swa": 0, "late": STEPS // 2}


@dataclass(frozen=True)
class Way:
    """An optimizer with its rates, for a LoRA and for whole weights, and how it is used."""

    path: str
    lora: float = 1e-2
    full: float = 1e-3
    options: dict = field(default_factory=dict)
    step: str = "plain"  # or closure, or two (SAM's first_step and second_step)
    keep: str = "weights"  # or ema, swa, late (swa of the second half), mean (ASGD's own), eval
    ndim: int = 1  # the least that it takes

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        package, _, name = self.path.rpartition(".")
        make = getattr(importlib.import_module(package), name)
        taken = [p for p in model.parameters() if p.requires_grad and p.ndim >= self.ndim]
        return make(params=taken, lr=rate, **self.options)


T, P, S, ADAMW = "torch.optim.", "pytorch_optimizer.", "schedulefree.", torch.optim.AdamW
LOW_RANK = {"rank": 2, "update_proj_gap": 10, "scale": 1.0, "projection_type": "std"}
WAYS = {
    "AdamW": Way(T + "AdamW"),
    "Adam": Way(T + "Adam"),
    "SGD": Way(T + "SGD", 1.0, 0.1),
    "SGD, Nesterov": Way(T + "SGD", 0.1, 0.03, {"momentum": 0.9, "nesterov": True}),
    "Adagrad": Way(T + "Adagrad", 1e-2, 3e-3),
    "Adadelta": Way(T + "Adadelta", 3.0, 1.0),
    "RMSprop": Way(T + "RMSprop", 3e-3, 3e-4),
    "Rprop": Way(T + "Rprop", 1e-3, 1e-4),
    "NAdam": Way(T + "NAdam"),
    "RAdam": Way(T + "RAdam", 3e-2, 3e-3),
    "Adamax": Way(T + "Adamax"),
    "ASGD": Way(T + "ASGD", 1.0, 0.1),
    "ASGD, its mean": Way(T + "ASGD", 1.0, 0.1, {"t0": 1}, keep="mean"),
    "Adafactor": Way(T + "Adafactor", 0.3, 3e-2),
    "Muon": Way(T + "Muon", 1e-2, 1e-2, ndim=2),
    "LBFGS": Way(T + "LBFGS", 1e-2, 3e-2, {"max_iter": 4}, step="closure"),
    "AdamW, EMA of weights": Way(T + "AdamW", keep="ema"),
    "AdamW, SWA": Way(T + "AdamW", keep="swa"),
    "AdamW, SWA of last half": Way(T + "AdamW", keep="late"),
    "Lookahead": Way(P + "Lookahead", options={"optimizer": ADAMW, "k": 5}),
    "schedule-free AdamW": Way(S + "AdamWScheduleFree", keep="eval"),
    "schedule-free SGD": Way(S + "SGDScheduleFree", 1.0, 0.3, keep="eval"),
    "schedule-free RAdam": Way(S + "RAdamScheduleFree", 3e-2, 3e-3, keep="eval"),
    "Lion": Way(P + "Lion", 3e-3, 3e-4),
    "Prodigy": Way(P + "Prodigy", 1.0, 1.0, {"d0": 1e-4, "growth_rate": 1.1}),
    "SOAP": Way(P + "SOAP"),
    "Shampoo": Way(P + "Shampoo", 0.1, 3e-2),
    "SAM": Way(P + "SAM", options={"base_optimizer": ADAMW}, step="closure"),
    "SAM in two steps": Way(P + "SAM", options={"base_optimizer": ADAMW}, step="two"),
    "CAME": Way(P + "CAME", 1e-3, 1e-3),
    "ADOPT": Way(P + "ADOPT"),
    "GaLore": Way(P + "GaLore", 1e-2, 3e-3, LOW_RANK),
    "LARS": Way(P + "LARS", 10.0, 3.0),
    "LAMB": Way(P + "Lamb", 1e-2, 1e-2),
    "AdamW8bit": Way("bitsandbytes.optim.AdamW8bit", options={"min_8bit_size": 1}),
}


def built(kind: str) -> nn.Module:
    """A random Llama, loud enough that every part of a block counts, and what trains of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(5 if p.ndim > 1 else 1).requires_grad_(".layers." in name)
    config = {
        "lora": LoraConfig(r=RANK["lora"], lora_alpha=8, target_modules="all-linear"),
        "osf": OSFConfig(effective_rank=RANK["osf"], target_modules="all-linear"),
    }
    return get_peft_model(model, config[kind]) if kind in config else model


@torch.no_grad()
def matrices(model: nn.Module) -> dict[str, Tensor]:
    """By module what each map of the blocks does, its adapter included: `[d_out, d_in]`, fp64."""
    kind = BaseTunerLayer if hasattr(model, "peft_config") else nn.Linear
    return {
        name: copy.deepcopy(m).double()(torch.eye(m.in_features).double()).mT
        for name, m in model.named_modules()
        if isinstance(m, kind) and ".layers." in name
    }


def place(name: str) -> tuple[str, str]:
    """The module of a guarded parameter, and the side that its basis lies on."""
    module, _, rest = name.partition(".lora_" if ".lora_" in name else ".weight")
    return module, "inputs" if rest.startswith("A") or rest.endswith("(inputs)") else "outputs"


def measured(model: nn.Module, bases: dict[str, Tensor], before: dict[str, Tensor]) -> dict:
    """See the top; `before` is what `matrices` were."""
    shares: dict[str, dict[str, float]] = {"outputs": {}, "inputs": {}}
    now, moved = matrices(model), []
    for name, basis in bases.items():
        at, side = place(name)
        W, U = before[at], basis.double()
        D = now[at] - W
        inside = U.mT @ D if side == "outputs" else D @ U
        share = float(inside.norm() / D.norm()) if D.any() else 0.0
        shares[side][name] = math.inf if math.isnan(share) else share
        moved.append(float(D.norm() / W.norm()))
    most = {side: short(max(of.values(), default=None)) for side, of in shares.items()}
    both = shares["outputs"] | shares["inputs"]
    at = max(both, key=both.get).removeprefix("base_model.model.")
    return {**most, "at": at, "moved": short(min(moved))}


def short(value):
    """Three digits; NaN and infinity as words, which JSON has no numbers for."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Of the next of four batches of made tokens; its loss."""
    ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(step % 4))
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def train(model: nn.Module, way: Way, optimizer: torch.optim.Optimizer) -> list[float]:
    """Leave in the model what `way` keeps; the losses before the first and the last step."""
    update = get_ema_multi_avg_fn(0.9) if way.keep == "ema" else None
    average = AveragedModel(model, multi_avg_fn=update)
    if way.keep == "eval":
        optimizer.train()
    losses = []
    for step in range(STEPS):
        again = partial(gradients, model, optimizer, step)
        losses.append(again())
        if way.step == "two":
            optimizer.first_step()
            again()
            optimizer.second_step()
        else:
            optimizer.step(*([again] if way.step == "closure" else []))
        if step >= AVERAGED_FROM.get(way.keep, STEPS):
            average.update_parameters(model)
    if way.keep == "eval":
        optimizer.eval()
    means = {p: optimizer.state[p]["ax"] for p in optimizer.state if way.keep == "mean"}
    if way.keep in AVERAGED_FROM:
        means = dict(zip(model.parameters(), average.module.parameters(), strict=True))
    for p, mean in means.items():
        p.data.copy_(mean)
    return [short(losses[0]), short(losses[-1])]


def guarded(kind: str, way: Way, rate: float) -> tuple[dict, dict[str, Tensor]]:
    model = built(kind)
    before, optimizer = matrices(model), way.optimizer(model, rate)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        with Guard(model, reference=PROMPTS, tokens=8, optimizer=optimizer) as guard:
            losses = train(model, way, optimizer)
    run = {"loss": losses, **measured(model, guard.bases, before)}
    if told := [m for w in said if "no step of" in (m := str(w.message))]:
        run["warned"] = told[0]
    found = guard.certificate()
    bound = max(found["modules"].values(), key=lambda m: m["through"] or 0.0)["bound"]
    certified = {"through": found["through"], "holds": found["holds"], "bound": bound}
    return {"guarded": run, "certified": {k: short(v) for k, v in certified.items()}}, guard.bases


def off(model: nn.Module, bases: dict[str, Tensor]) -> None:
    """Project gradients off bases from now on."""
    for name, basis in bases.items():
        side = "left" if place(name)[1] == "outputs" else "right"
        p = model.get_parameter(name.removesuffix(" (inputs)").removesuffix(".weight") + ".weight")
        if ".lora_" in name:
            gk.project_(p.data, basis, side=side)
        p.register_post_accumulate_grad_hook(
            lambda p, basis=basis, side=side: gk.project_(p.grad, basis, side=side)
        )


def protected(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's OSF keeps gradients off, named as a guard's bases."""
    bases = {}
    for name in matrices(model):
        W = model.get_submodule(name).base_layer.weight
        parts = decompose_weight_matrix(W, RANK["osf"])
        bases |= {f"{name}.weight": parts["U_high"], f"{name}.weight (inputs)": parts["V_high"].mT}
    return bases


def row(kind: str, way: Way) -> dict:
    if find_spec(way.path.split(".")[0]) is None:
        return {"missing": "not installed"}
    rate = way.lora if kind == "lora" else way.full
    model = built(kind)
    if kind == "osf":
        found, bases = {}, protected(model)
    else:
        found, bases = guarded(kind, way, rate)
        off(model, bases)
    before = matrices(model)
    losses = train(model, way, way.optimizer(model, rate))
    alone = {"loss": losses, **measured(model, bases, before)}
    return {"rate": rate, **found, "gradients_only": alone}


HEAD = "trained,optimizer,rate,loss,moved,U,V,certified,holds,gradients only: loss,U,V".split(",")


def cells(row: dict) -> list[str]:
    if "missing" in row:
        return list(row.values())
    ours, alone, said = row.get("guarded", {}), row["gradients_only"], row.get("certified", {})
    values = [row["trained"], row["optimizer"], row["rate"], ours.get("loss", [""])[-1]]
    values += [ours.get(k, "") for k in ("moved", "outputs", "inputs")]
    values += [said.get("through", ""), {True: "yes", False: "no"}.get(said.get("holds"), "")]
    values += [alone["loss"][-1], alone["outputs"], alone["inputs"]]
    return [f"{v:.2g}" if isinstance(v, float) else str(v) for v in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--only", help="optimizers, by name; nothing is saved")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leak_cpu.json"))
    options = parser.parse_args()
    chosen = [n for n in WAYS if not options.only or n in options.only.split(",")]
    runs = [(kind, n) for kind in ("lora", "full") for n in chosen]
    runs += [("osf", n) for n in chosen if n in ("SGD", "AdamW")]
    shown = track(runs, console=Console(stderr=True))
    rows = [{"trained": kind, "optimizer": n, **row(kind, WAYS[n])} for kind, n in shown]
    table = Table(*HEAD, box=box.MARKDOWN if options.markdown else box.ROUNDED)
    for found in rows:
        table.add_row(*cells(found))
    Console(width=160).print(table)
    if options.only:
        return
    found = about(torch.device("cpu")) | {p: version(p) for p in PACKAGES if find_spec(p)}
    found |= {"dtype": "float32", "steps": STEPS, "shapes": SHAPES, "rank": RANK}
    print(write_json(options.out, {"about": found, "rows": rows}))


if __name__ == "__main__":
    main()
