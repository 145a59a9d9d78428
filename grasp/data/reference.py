"""How far a model has moved on prompts that have nothing to do with its fine-tune.

    D = mean over tokens of KL(base ‖ model)

Nobody labels the prompts: the tokens are continuations drawn from the base model, and, where there
is one, from a plain fine-tune of it, which shows what drift looks like there. What is compared is
the base model's distribution over the next token, kept from the moment that it was drawn by.
"""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from grasp.data.chat import pad
from grasp.data.drawing import Continued, draw
from grasp.data.prompts import tokenized
from grasp.model import evaluating, memory, processes, resting, sharding

TOP = 256  # tokens of the base's distribution are kept at each position; the rest count as one


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
    ):
        rows = tokenized(prompts, tokenizer)
        if sharding.is_split(model):  # as `draw` does, with as many
            rows = processes.object_from_first(rows)
        leading = _Leading(len(rows), tokens)
        continued = draw(model, rows, tokens=tokens, seed=seed, see=leading.keep)
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
            own += [_leading(self._logs(model, [i])) for i in range(len(own), len(continued))]
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
        total, positions = 0.0, 0
        with evaluating(model), torch.no_grad():
            for start in range(0, len(self.ids), self.batch):
                rows = list(range(start, min(start + self.batch, len(self.ids))))
                count = sum(len(self.top[i]) for i in rows)
                total += float(self.divergence(model, rows)) * count
                positions += count
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
            self.all = [T.new_empty(*self.shape, T.shape[1]) for T in found]
        at = [self.counts[i] for i in prompts]
        for kept, T in zip(self.all, found, strict=True):
            kept[prompts, at] = T
        for i in prompts:
            self.counts[i] += 1

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
