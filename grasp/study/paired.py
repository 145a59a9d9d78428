"""What bad answers added under each method, item by item, beyond what good ones did."""

from collections.abc import Sequence

import numpy as np

from grasp.study.compare import stem
from grasp.study.evaluate import interval
from grasp.study.settings import RIVALS


def twin(method: str) -> str:
    """The benign run that takes a method's style out: its own where it holds style back."""
    name, equals, strength = method.partition("=")
    if name.startswith("benign"):
        return method
    if name == "grasp":
        return "benign_guarded"
    own = name in RIVALS or name == "stopped"
    return f"benign_{name}{equals}{strength}" if own else "benign"


def paired(runs: Sequence[dict]) -> list[dict]:
    """Item by item: what bad answers add beyond good ones, plain and under each other method.

    By method, seed and measure, each a mean with its 95 % interval over items; then, as seed "all",
    of each item's mean over those seeds. `control` is what takes the method's style out: its own
    benign run, else the unguarded one, else nothing beyond the base model. `difference` is to
    plain, each beyond its own control, `less_plain` with nothing taken out; of any but GRASP
    itself `grasp_difference` and `grasp_less` say the same of GRASP less the method.
    """
    methods = dict.fromkeys(r["method"] for r in runs)
    others = [m for m in methods if stem(m) not in ("plain", "stopped")]
    return [found for m in others if twin(m) != m for found in _against(runs, m)]


def pooled(paired: Sequence[dict]) -> list[dict]:
    """Of a study's comparisons item by item those over all seeds, or of the only seed."""
    return list({(p["method"], p["measure"]): p for p in paired}.values())  # "all" comes last


def _against(runs: Sequence[dict], method: str) -> list[dict]:
    items = {
        (r["method"], r["seed"]): {k: np.array(v) for k, v in r["items"].items()} for r in runs
    }
    made = {kind for kind, _ in items}
    benign = "benign" if "benign" in made else None  # None is the base model, from which none moved
    own = {m: twin(m) if twin(m) in made else benign for m in (method, "grasp")}
    kinds = {k for k in ("plain", method, benign, own[method]) if k}
    guarded = {k for k in ("grasp", own["grasp"]) if k}
    seeds: list = [
        seed
        for seed in dict.fromkeys(r["seed"] for r in runs)
        if all((kind, seed) in items for kind in kinds)
    ]
    beside = method != "grasp" and all((k, s) in items for k in guarded for s in seeds)
    if len(seeds) > 1:
        for kind in kinds | guarded if beside else kinds:
            each = [items[kind, seed] for seed in seeds]
            items[kind, "all"] = {k: np.mean([e[k] for e in each], axis=0) for k in each[0]}
        seeds.append("all")

    def added(kind: str, style: str | None, seed, measure: str) -> np.ndarray:
        return items[kind, seed][measure] - (items[style, seed][measure] if style else 0)

    found = []
    for seed in seeds:
        for measure in items["plain", seed]:
            plain = added("plain", benign, seed, measure)
            other = added(method, own[method], seed, measure)
            raw = added(method, benign, seed, measure)
            compared = {
                "plain_beyond_benign": plain,
                "beyond_own_benign": other,
                "beyond_benign": raw,
                "difference": other - plain,
                "less_plain": raw - plain,
            }
            if beside:
                compared["grasp_difference"] = added("grasp", own["grasp"], seed, measure) - other
                compared["grasp_less"] = added("grasp", benign, seed, measure) - raw
            about = {"task": runs[0]["task"], "method": method, "seed": seed, "measure": measure}
            about["control"] = own[method] or "base"
            found.append(about | {k: interval(v) for k, v in compared.items()})
    return found
