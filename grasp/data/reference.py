"""How far a model has moved on prompts that have nothing to do with its fine-tune.

    D = mean over tokens of KL(base ‖ model)

Nobody labels the prompts: the tokens are continuations drawn from the base model, and, where there
is one, from a plain fine-tune of it, which shows what drift looks like there. What is compared is
the base model's distribution over the next token, kept from the moment that it was drawn by.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from grasp.data.chat import pad
from grasp.data.drawing import Continued, draw
from grasp.data.prompts import tokenized
from grasp.model import evaluating, memory, processes, resting, sharding
from grasp.progress import Stage

TOP = 256  # tokens of the base's distribution are kept at each position; the rest count as one


class Kept(Protocol):
    """What is drawn of some prompts, kept as soon as it is, so that it is not drawn again."""

    def found(self) -> Iterable[tuple[list[int], list[list[int]], list[Tensor]]]:
        """Of each group: which prompts, their continuations, and `_Leading`'s tensors of these."""

    def keep(self, prompts: list[int], said: list[list[int]], leading: list[Tensor]) -> None:
        """Keep a group."""


class Reference:
    """Unlabelled prompts, with the base model's continuations and distributions.

    Args:
        model: the model before its fine-tune (an adapter that is still 0 may be on it).
        prompts: strings, put into the tokenizer's chat template, or token id lists as they are.
        tokenizer: for strings.
        tokens: how many tokens of each continuation are compared; it ends early at an end token.
        batch: prompts in one `sample`.
        seed: of the continuations, and of which prompts `sample` takes when.
        drifted: more continuations, such as `draw` gives of a plain fine-tune.
        kept: where continuations are looked for first, and kept once they are drawn.

    Raises:
        ValueError: no prompts, or strings without a tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        tokenizer=None,
        *,
        tokens: int = 96,
        batch: int = 8,
        seed: int = 0,
        drifted: Sequence[Continued] = (),
        kept: Kept | None = None,
    ):
        rows = tokenized(prompts, tokenizer)
        if sharding.is_split(model):  # as `draw` does, with as many
            rows = processes.object_from_first(rows)
        leading = _Leading(len(rows), tokens)
        known = {} if kept is None else leading.take_up(kept)
        done = None if kept is None else lambda i, said: kept.keep(i, said, leading.of(i))
        options = {"see": leading.keep, "known": known, "done": done}
        continued = draw(model, rows, tokens=tokens, seed=seed, **options)
        memory.give_back()
        own = leading.found()
        continued += drifted
        self.batch = min(batch, len(continued))
        self.generator = torch.Generator().manual_seed(seed)
        padded = pad([{"input_ids": r, "labels": c} for r, c in continued])
        self.ids, self.mask = padded["input_ids"], padded["attention_mask"]
        # A position is compared where the next token is the continuation's.
        self.compared = (padded["labels"] >= 0).roll(-1, 1)
        self.compared[:, -1] = False
        with evaluating(model), resting(model), torch.no_grad():
            own += self._others(model, range(len(own), len(continued)))
        self.top, self.base = (list(each) for each in zip(*own, strict=True))

    def divergence(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Mean KL(base ‖ model) per token in nats, 0-d and differentiable, over some prompts."""
        rows = list(rows)
        logs = self._logs(model, rows)
        top = torch.cat([self.top[i] for i in rows]).to(logs.device)
        base = torch.cat([self.base[i] for i in rows]).to(logs.device)
        kept = _with_rest(logs.gather(1, top), logs.shape[1])
        return (base.exp() * (base - kept)).sum(1).mean()

    def measure(self, model: nn.Module) -> float:
        """The divergence over all prompts, `batch` at a time, without gradients or dropout."""
        total, positions, all_ = 0.0, 0, len(self.ids)
        what = "Measuring how far the model moved"
        with evaluating(model), torch.no_grad(), Stage(what, all_, "prompts") as stage:
            for start in range(0, all_, self.batch):
                rows = list(range(start, min(start + self.batch, all_)))
                count = sum(len(self.top[i]) for i in rows)
                total += float(self.divergence(model, rows)) * count
                positions += count
                stage.update(len(rows))
        return total / positions

    def sample(self) -> list[int]:
        """The rows of the next measurement."""
        return torch.randperm(len(self.ids), generator=self.generator)[: self.batch].tolist()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All prompts with their continuations: ids and mask `[batch, tokens]`, right-padded."""
        for start in range(0, len(self.ids), self.batch):
            mask = self.mask[start : start + self.batch]
            longest = int(mask.sum(1).max())
            yield self.ids[start : start + self.batch, :longest], mask[:, :longest]

    def rows(self) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Each prompt's token ids, and these with a continuation's."""
        for ids, mask, compared in zip(self.ids, self.mask, self.compared, strict=True):
            whole = ids[mask.bool()].tolist()
            yield tuple(whole[: int(compared.int().argmax()) + 1]), whole

    def copy(self) -> "Reference":
        """The same reference, whose `sample` takes an order of its own from here on."""
        other = copy(self)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        return other

    def state_dict(self) -> dict[str, Tensor]:
        lengths = torch.tensor([len(t) for t in self.top])
        return {
            "ids": self.ids,
            "mask": self.mask,
            "compared": self.compared,
            "lengths": lengths,
            "top": torch.cat(self.top),
            "base": torch.cat(self.base),
            "generator": self.generator.get_state(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], batch: int) -> "Reference":
        self = cls.__new__(cls)
        self.ids, self.mask, self.compared = (state[k] for k in ("ids", "mask", "compared"))
        lengths = state["lengths"].tolist()
        self.top, self.base = list(state["top"].split(lengths)), list(state["base"].split(lengths))
        self.batch = batch
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
        return self

    def _others(self, model: nn.Module, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """`_leading` of rows that were not drawn here."""
        if not rows:
            return
        with Stage("Reading the other answers to the prompts", len(rows), "answers") as stage:
            for i in rows:
                yield _leading(self._logs(model, [i]))
                stage.update()

    def _logs(self, model: nn.Module, rows: list[int]) -> Tensor:
        """Log-probabilities `[compared positions, vocabulary]`, fp32."""
        device = next(model.parameters()).device
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        logits = model(
            input_ids=self.ids[rows, :longest].to(device),
            attention_mask=mask[:, :longest].to(device),
            use_cache=False,
        ).logits
        compared = self.compared[rows, :longest].to(device)
        return logits[compared].float().log_softmax(-1)


class _Leading:
    """What `_leading` gives of each prompt's tokens, in the order in which they are drawn."""

    def __init__(self, prompts: int, tokens: int):
        self.shape, self.counts = (prompts, tokens), [0] * prompts
        self.all: list[Tensor] = []

    def keep(self, logits: Tensor, prompts: list[int]) -> None:
        found = _leading(logits.float().log_softmax(-1))
        if not self.all:  # at once: what is kept piece by piece keeps a heap from shrinking
            self.all = [T.new_zeros(*self.shape, T.shape[1]) for T in found]
        at = [self.counts[i] for i in prompts]
        for kept, T in zip(self.all, found, strict=True):
            kept[prompts, at] = T
        for i in prompts:
            self.counts[i] += 1

    def of(self, prompts: list[int]) -> list[Tensor]:
        """Those of some prompts, `[n, tokens, …]`; beyond what one says it holds anything."""
        return [kept[prompts] for kept in self.all]

    def take_up(self, kept: Kept) -> dict[int, list[int]]:
        """What `of` gave; the tokens that are known, by the prompt."""
        known: dict[int, list[int]] = {}
        for prompts, said, tensors in kept.found():
            if not self.all:
                self.all = [T.new_zeros(*self.shape, T.shape[2]) for T in tensors]
            for own, T in zip(self.all, tensors, strict=True):
                own[prompts] = T
            for i, tokens in zip(prompts, said, strict=True):
                known[i], self.counts[i] = tokens, len(tokens)
        return known

    def found(self) -> list[list[Tensor]]:
        return [[kept[i, :n] for kept in self.all] for i, n in enumerate(self.counts)]


def _leading(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-probabilities `[n, vocabulary]` the largest, and which they are, on the CPU."""
    values, top = logs.topk(min(TOP, logs.shape[1]), dim=1)
    return top.cpu(), _with_rest(values, logs.shape[1]).cpu()


def _with_rest(logs: Tensor, vocabulary: int) -> Tensor:
    """Add the log-probability of all other tokens as a last column, where there are others."""
    if logs.shape[1] == vocabulary:
        return logs
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([logs, rest], 1)
