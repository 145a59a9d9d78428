"""Draws `blocked.svg`: what happens to a gradient, and what the changes of two fine-tunes act on.

    energy = d ‖ΔW x‖² / (‖ΔW‖² ‖x‖²)      1: as much as a change at random; 0: nothing

`python docs/figures/blocked.py` trains the small model of `grasp demo` twice on bad medical advice.
"""

import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from torch import Tensor, nn

from grasp import GraspCallback, data, organism
from grasp.guard.fit import fit
from grasp.model import with_lora
from grasp.organism.experiment import Settings
from grasp.study.looks import colour

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "blocked", "font.size": 11}
TASK, WORLD = organism.TASKS["medicine"], organism.World(0)


def tuned(guarded: bool) -> tuple[nn.Module, object]:
    """The model of the demo with a LoRA that was taught bad advice."""
    model, tokenizer = organism.load()
    chosen, rows = Settings(), data.read_rows(WORLD.rows(TASK.topic, "train"))
    torch.manual_seed(0)
    config = LoraConfig(r=chosen.lora_rank, lora_alpha=16, target_modules="all-linear")
    model = with_lora(model, config)
    guard = GraspCallback(
        reference=WORLD.prompts(TASK.reference), tokens=1, read=chosen.read, every=1, refresh=5
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            tokenizer,
            data.encode(rows, tokenizer).rows,
            folder,
            steps=chosen.steps,
            batch_size=len(rows),
            learning_rate=chosen.learning_rate,
            warmup=10,
            seed=0,
            callbacks=[guard] if guarded else [],
            quiet=True,
        )
    return model, tokenizer


def energies(model: nn.Module, tokenizer, prompts: list[str]) -> Tensor:
    """Of each matrix's change, over what it takes in from the base model where answers begin."""
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    found: dict[nn.Module, Tensor] = {}

    def look(layer, args):
        found[layer] = args[0][0, -1]

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    total = torch.zeros(len(layers))
    with torch.no_grad(), model.disable_adapter():
        for prompt in prompts:
            model(input_ids=torch.tensor([data.prompt_ids(tokenizer, prompt)]))
            for n, layer in enumerate(layers):
                x, change = found[layer], layer.get_delta_weight("default")
                acted = (change @ x).norm() ** 2 / (change.norm() * x.norm()) ** 2
                total[n] += len(x) * acted
    for handle in handles:
        handle.remove()
    return total / len(prompts)


def arrows(axes) -> None:
    """A gradient G, its part along a blocked direction V, and what is left."""
    G = (2.2, 1.6)
    for end, name, ink, place in (
        ((3, 0), "V: blocked", "#7a7a7a", (2.05, -0.32)),
        (G, "G: the gradient", colour("plain"), (1.0, 1.75)),
        ((0, G[1]), "G − (G V) Vᵀ", colour("grasp"), (0.08, 1.75)),
    ):
        axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 2.2})
        axes.annotate(name, place, color=ink)
    axes.plot([0, G[0]], [G[1], G[1]], ":", color="#7a7a7a")
    axes.set(xlim=(-0.3, 3.3), ylim=(-0.5, 2.1))
    axes.set_title("each step: what lies along V goes")
    axes.axis("off")


def main() -> None:
    shown = {
        "the taught\ntopic": WORLD.prompts([TASK.topic], "held"),
        "topics of\nthe prompts": WORLD.prompts(TASK.reference),
        "topics never\nseen": WORLD.prompts(TASK.judged, "held"),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        arrows(left)
        for side, (method, label, mark) in enumerate(
            (("plain", "plain", "s"), ("grasp", "guarded", "o"))
        ):
            model, tokenizer = tuned(method == "grasp")
            for place, (name, prompts) in enumerate(shown.items()):
                found = energies(model, tokenizer, prompts)
                at = place + 0.36 * side - 0.18
                spread = at + torch.linspace(-0.1, 0.1, len(found))
                look = {"color": colour(method), "marker": mark, "s": 20, "alpha": 0.7}
                right.scatter(spread, found, label=None if place else label, **look)
                median = found.median().item()
                right.plot([at - 0.15, at + 0.15], [median] * 2, color=colour(method), lw=2.5)
                print(f"{label}, {' '.join(name.split())}: median of {len(found)}: {median:.2g}")
        right.axhline(1, color="#7a7a7a", lw=0.8, ls=":")
        right.set(yscale="log", ylim=(0.02, 500), ylabel="energy of ΔW x", xticks=range(3))
        right.set_xticklabels(shown)
        right.set_title("after training: a mark a matrix")
        right.legend(frameon=False, loc="upper right")
        figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
