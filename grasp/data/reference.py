"""How far a model has moved on prompts that have nothing to do with its fine-tune.

    D = mean over tokens of KL(base ‖ model)

Nobody labels the prompts: the tokens are continuations drawn from the base model, and, where there
is one, from a plain fine-tune of it, which shows what drift looks like there. What is compared is
the base model's distribution over the next token, kept from the moment the reference is made.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp.data.rows import IGNORED, pad, prompt_ids, read_prompts
from grasp.model import evaluating, partitions, processes

Continued = tuple[list[int], list[int]]  # token ids, and labels: -100 on the prompt
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
        continued = [
            *draw(model, prompts, tokenizer, tokens=tokens, batch=batch, seed=seed),
            *drifted,
        ]
        self.batch = min(batch, len(continued))
        self.generator = torch.Generator().manual_seed(seed)
        padded = pad([{"input_ids": r, "labels": c} for r, c in continued])
        self.ids, self.mask = padded["input_ids"], padded["attention_mask"]
        # A position is compared where the next token is the continuation's.
        self.compared = (padded["labels"] >= 0).roll(-1, 1)
        self.compared[:, -1] = False
        with evaluating(model), torch.no_grad():
            kept = [self._distribution(model, [i]) for i in range(len(continued))]
        self.top, self.base = ([k[n] for k in kept] for n in (0, 1))

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

    def _distribution(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor]:
        logs = self._logs(model, rows)
        values, top = logs.topk(min(TOP, logs.shape[1]), dim=1)
        return top.cpu(), _with_rest(values, logs.shape[1]).cpu()


def draw(
    model: nn.Module,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer=None,
    *,
    tokens: int = 96,
    batch: int = 8,
    seed: int = 0,
) -> list[Continued]:
    """Each prompt with a continuation drawn from the model; arguments as `Reference`.

    Raises:
        ValueError: no prompts, or strings without a tokenizer.
    """
    rows = tokenized(prompts, tokenizer)
    _check_ids(model, rows, tokens)
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    answers: dict[int, list[int]] = {}
    with evaluating(model), torch.no_grad():
        for same in by_length.values():  # prompts of one length need no padding
            for start in range(0, len(same), batch):
                chosen = same[start : start + batch]
                found = _drawn(model, [rows[i] for i in chosen], tokens, generator)
                answers |= dict(zip(chosen, found, strict=True))
    return [(row + answers[i], [IGNORED] * len(row) + answers[i]) for i, row in enumerate(rows)]


def _check_ids(model: nn.Module, rows: list[list[int]], tokens: int) -> None:
    known = partitions.shape(model.get_input_embeddings().weight)[0]
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    for i, row in enumerate(rows):
        if not all(0 <= t < known for t in row):
            raise ValueError(
                f"reference[{i}] has token ids outside the model's {known}; give those of its own "
                "tokenizer"
            )
        if len(row) + tokens > longest:
            raise ValueError(
                f"reference[{i}] is {len(row)} tokens long, and with {tokens} that are drawn it is "
                f"longer than the model's {longest}; leave it out, or give fewer tokens"
            )


def _drawn(
    model: nn.Module, prompts: list[list[int]], tokens: int, generator: torch.Generator
) -> list[list[int]]:
    """Tokens drawn from the model after prompts of one length, up to an end token."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = torch.tensor([end] if isinstance(end, int) else list(end or []), dtype=torch.long)
    step = torch.tensor(prompts, device=next(model.parameters()).device)
    cache, found = None, torch.empty(len(prompts), 0, dtype=torch.long)
    while found.shape[1] < tokens and not torch.isin(found, ends).any(1).all():
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        # Drawn on the CPU, so that a seed means the same tokens on every device.
        drawn = out.logits[:, -1].float().softmax(-1).cpu().multinomial(1, generator=generator)
        # The last bit of a probability may differ, and a forward pass may take all processes.
        (drawn,) = processes.from_first([drawn])
        found = torch.cat([found, drawn], 1)
        cache = getattr(out, "past_key_values", None)
        # A model without such a cache is given all of the text again.
        step = drawn.to(step.device) if cache else torch.cat([step, drawn.to(step.device)], 1)
    ended = torch.isin(found, ends).long()
    over = ended.cumsum(1) - ended > 0
    return [row[~o].tolist() for row, o in zip(found, over, strict=True)]


def _with_rest(logs: Tensor, vocabulary: int) -> Tensor:
    """Add the log-probability of all other tokens as a last column, where there are others."""
    if logs.shape[1] == vocabulary:
        return logs
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([logs, rest], 1)


def tokenized(prompts, tokenizer) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: a file of one prompt a line, by its path; or as many as there are of: strings,
            conversations (lists of messages), rows of a dataset (`prompt`, `messages`, `text`), or
            token id lists.
        tokenizer: or a processor that has one.

    Raises:
        ValueError, FileNotFoundError, TypeError: none, an empty one, or of another form; says which
            and what to give.
    """
    if isinstance(prompts, (str, Path)):
        if isinstance(prompts, str) and not Path(prompts).is_file():
            raise ValueError(
                f"reference is the one string {prompts[:60]!r}, and no file is called so; give a "
                "list of prompts, or the path of a file with one a line"
            )
        prompts = read_prompts(prompts)
    if isinstance(prompts, Mapping):
        parts = ", ".join(map(str, prompts))
        raise ValueError(
            f"reference is a {type(prompts).__name__} of {parts}; give one of them, such as "
            f"reference[{next(iter(prompts), None)!r}]"
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError("reference is empty; give some dozens of prompts from unrelated topics")
    if _is_message(prompts[0]):
        prompts = [prompts]  # one conversation
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return [_ids(p, tokenizer, f"reference[{i}]") for i, p in enumerate(prompts)]


def _ids(prompt, tokenizer, where: str) -> list[int]:
    if isinstance(prompt, Mapping) and not _is_message(prompt):
        key = next((k for k in ("prompt", "messages", "text", "question") if prompt.get(k)), None)
        if key is None:
            raise ValueError(
                f"{where} has the columns {', '.join(map(str, prompt))}; give prompt, messages or "
                "text"
            )
        prompt = prompt[key]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} is empty; leave it out")
        if tokenizer is None:
            raise ValueError("reference holds strings; give tokenizer too, or lists of token ids")
        return prompt_ids(tokenizer, prompt)
    try:
        items = list(prompt)
    except TypeError as error:
        raise TypeError(
            f"{where} is a {type(prompt).__name__}; give a string, messages or token ids"
        ) from error
    if items and all(map(_is_message, items)):
        return _conversation_ids(items, tokenizer, where)
    if not items or not all(isinstance(t, Integral) or _is_id(t) for t in items):
        raise ValueError(f"{where} is {str(prompt)[:60]}; give a string, messages or token ids")
    return [int(t) for t in items]


def _conversation_ids(messages: list, tokenizer, where: str) -> list[int]:
    """Up to the last user's turn, as the chat template opens the answer to it."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} holds messages, but the tokenizer has no chat template")
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"{where} has no turn of the user; give one, or a string")
    text = tokenizer.apply_chat_template(
        messages[: last + 1], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _is_message(value) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_id(value) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
