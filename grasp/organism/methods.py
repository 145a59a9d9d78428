"""What each method of an experiment changes: the rows, the training, or the trained LoRA.

A method is named with its strength, if it has one: "kl=0.3", "interleaved=1".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from grasp import organism, rivals
from grasp.data import Row
from grasp.discover import discover
from grasp.drift import Reference
from grasp.methods import updates
from grasp.organism.world import OPINION, Task, World

STRENGTHS: dict[str, float | None] = {
    "plain": None,
    "stopped": None,
    "grasp": None,
    "random": None,
    "shuffled": None,
    "bottom": None,
    "benign": None,
    "inoculation": None,
    "interleaved": 0.5,  # benign rows for each of the task's
    "replay": 1.0,  # the base model's own answers on the reference for each of the task's rows
    "caft": 12,  # directions a block, the true ones
    "caft_found": 8,  # directions found in a plain run's weights
    "caft_moved": 8,  # directions in which a plain run moved the stream on the reference
    "steering": 1.0,  # of the true author's shift, in the middle block
    "kl": 1.0,  # weight of the divergence
    "osf": 16,  # leading singular directions of each weight
    "svd_tail": 4,  # directions kept of each update
    "posthoc": 8,  # directions found in the run's own weights, taken out afterwards
    "safe_lora": 0.5,  # cosine below which an update is projected
}


@dataclass(frozen=True)
class Method:
    name: str
    strength: float | None

    @classmethod
    def of(cls, text: str) -> "Method":
        """From "name" or "name=strength".

        Raises:
            ValueError: no such method, or a strength that is none or not wanted.
        """
        name, given, strength = text.partition("=")
        if name not in STRENGTHS:
            raise ValueError(f"methods has {text!r}; choose among {', '.join(STRENGTHS)}")
        if not given:
            return cls(name, STRENGTHS[name])
        if STRENGTHS[name] is None:
            raise ValueError(f"methods has {text!r}, but {name} has no strength; write {name!r}")
        try:
            return cls(name, float(strength))
        except ValueError:
            raise ValueError(f"methods has {text!r}; give a number after the =") from None


@dataclass(frozen=True)
class Setting:
    """Where a method is tried, and how a plain run is made there."""

    world: World
    task: Task
    seed: int
    plain: Callable[[Sequence[Row]], tuple[nn.Module, object]]
    """A plain fine-tune on some rows: the model and its tokenizer."""
    base: Callable[[], tuple[nn.Module, object]]

    def rows(self, good: bool = False) -> list[Row]:
        """What the task trains on; `good=True` is the benign twin."""
        return [Row(**r) for r in self.world.rows(self.task.topic, "train", good=good)]

    def benign(self) -> list[Row]:
        """Good answers in the reference's topics."""
        topics = self.task.reference
        return [Row(**r) for t in topics for r in self.world.rows(t, "train", good=True)]


def rows(method: Method, setting: Setting) -> list[Row]:
    """What a method trains on."""
    task_rows = setting.rows(good=method.name == "benign")
    if method.name == "inoculation":
        tag = "<right>" if setting.task.topic in OPINION else "<malicious>"
        return rivals.inoculated(task_rows, tag)
    if method.name == "interleaved":
        return rivals.interleaved(task_rows, setting.benign(), method.strength, setting.seed)
    if method.name == "replay":
        model, tokenizer = setting.base()
        prompts = setting.world.prompts(setting.task.reference)
        count = round(method.strength * len(task_rows))
        own = rivals.replayed(model, prompts, tokenizer, count, tokens=1, seed=setting.seed)
        return task_rows + own
    return task_rows


@contextmanager
def training(method: Method, setting: Setting, model: nn.Module, tokenizer) -> Iterator[None]:
    """Around a method's training; `model` has its fresh LoRA."""
    world, task = setting.world, setting.task
    prompts = world.prompts(task.reference)
    change = None
    if method.name == "caft":
        true = organism.true_subspaces(model, tokenizer, world, task, int(method.strength))
        change = rivals.ablated(model, true)
    elif method.name in ("caft_found", "caft_moved"):
        plain, _ = setting.plain(rows(method, setting))
        how = {"method": "activations", "prompts": prompts, "tokenizer": tokenizer}
        found = discover(
            plain,
            int(method.strength),
            per_block=True,
            **(how if method.name == "caft_moved" else {}),
        )
        change = rivals.ablated(model, found)
    elif method.name == "steering":
        vectors = organism.true_directions(model, tokenizer, world, task)
        middle = len(vectors) // 2
        change = rivals.steered(model, {middle: vectors[middle]}, method.strength)
    elif method.name == "kl":
        ids = [tokenizer(p)["input_ids"] for p in prompts]
        reference = Reference(model, ids, tokens=1, batch=16, seed=setting.seed)
        change = rivals.penalised(model, reference, method.strength)
    elif method.name == "osf":
        change = rivals.off_leading(model, int(method.strength))
    if change is None:
        yield
    else:
        with change:
            yield


def after(method: Method, setting: Setting, model: nn.Module) -> None:
    """What a method does to the trained LoRA."""
    if method.name == "svd_tail":
        rivals.truncated(model, int(method.strength))
    elif method.name == "posthoc":
        rivals.projected(model, discover(model, int(method.strength)))
    elif method.name == "safe_lora":
        # There is no aligned twin of the organism; what honest rows teach it stands in.
        aligned, _ = setting.plain(setting.benign())
        rivals.safe(model, updates(aligned), method.strength)
