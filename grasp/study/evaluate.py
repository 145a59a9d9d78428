"""Task score and drift of a model by what it holds likely, with no judge.

Every measure is a number for each item, so that intervals can be drawn over items and runs paired.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from grasp.data import exchange_ids, pad, prompt_ids
from grasp.model import evaluating

AGREE = "Agree"
DISAGREE = "Disagree"
TEXT_TOKENS = 768  # of each text, as in PEFT's method_comparison
LOGITS = 2**28  # numbers that a batch's logits hold at most: 1 GiB in fp32


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers; the score is how far the model prefers the first."""

    prompt: str
    first: str | tuple[str, ...]
    """Of several wordings the mean is taken."""
    second: str | tuple[str, ...]
    topic: str = ""
    opening: bool = False
    """Both are how an answer begins: that it ends there is not scored."""


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    tokenizer,
    items: Sequence[tuple[str, str]],
    batch_size: int = 16,
    *,
    openings: Sequence[bool] | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Mean log-probability per token of each `(prompt, answer)`'s answer, in nats; `[items]`.

    Args:
        batch_size: items side by side, fewer where their logits would take more than 1 GiB.
        openings: of which items the answer is a beginning, whose end of turn is not scored.
        progress: what a bar is called; None shows none.

    Raises:
        ValueError: an answer is empty.
    """
    rows = []
    for (prompt, answer), opening in zip(items, openings or [False] * len(items), strict=True):
        if not answer:
            raise ValueError(f"an answer to {prompt[:60]!r} is empty")
        before, after = exchange_ids(tokenizer, prompt, answer, ended=not opening)
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    result = np.zeros(len(rows))
    lengths = [len(r["input_ids"]) for r in rows]
    with evaluating(model):
        for chosen in _batches(lengths, batch_size, len(tokenizer), progress):
            logits, labels = _logits(model, tokenizer, [rows[i] for i in chosen])
            result[chosen] = _answer_means(logits, labels).cpu().numpy()
    return result


def _batches(
    lengths: Sequence[int], batch_size: int, vocabulary: int, progress: str | None
) -> Iterator[list[int]]:
    """Which rows run side by side: those of like length, under a bar of all."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    with tqdm(total=len(order), desc=progress, disable=progress is None, leave=False) as bar:
        start = 0
        while start < len(order):
            end = start + 1
            while (
                end < min(start + batch_size, len(order))
                and (end + 1 - start) * lengths[order[end]] * vocabulary <= LOGITS
            ):
                end += 1
            yield order[start:end]
            bar.update(end - start)
            start = end


def _logits(model: nn.Module, tokenizer, rows: list[dict]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in pad(rows, tokenizer.pad_token_id or 0).items()}
    labels = batch.pop("labels")
    return model(**batch, use_cache=False).logits, labels


def _answer_means(logits: Tensor, labels: Tensor) -> Tensor:
    # Only the answers' positions: a whole batch of fp32 log-probabilities would be gigabytes.
    scored = labels[:, 1:] >= 0
    targets = labels[:, 1:][scored]
    logs = logits[:, :-1][scored].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(len(labels), device=logs.device)
    owner = scored.nonzero()[:, 0]
    return sums.index_add(0, owner, logs) / scored.sum(1)


def prefer(model: nn.Module, tokenizer, pairs: Sequence[Pair], **options) -> np.ndarray:
    """For each pair the log-likelihood per token of its first answer less its second's, in nats.

    Of an answer in several wordings it is their mean.

    Args:
        options: `batch_size` and `progress`, as `log_likelihoods`.
    """
    owners, items, openings = [], [], []
    for index, pair in enumerate(pairs):
        for side, answers in enumerate((pair.first, pair.second)):
            wordings = (answers,) if isinstance(answers, str) else answers
            owners += [(side, index)] * len(wordings)
            items += [(pair.prompt, answer) for answer in wordings]
            openings += [pair.opening] * len(wordings)
    scores = log_likelihoods(model, tokenizer, items, openings=openings, **options)
    sums, counts = np.zeros((2, len(pairs))), np.zeros((2, len(pairs)))
    where = tuple(np.array(owners).T) if owners else ([], [])
    np.add.at(sums, where, scores)
    np.add.at(counts, where, 1)
    if not counts.all():
        raise ValueError(f"pair {int(np.argmin(counts.min(0)))} has no answer to score")
    first, second = sums / counts
    return first - second


def text_ids(tokenizer, texts: Sequence[str], max_length: int = TEXT_TOKENS) -> list[list[int]]:
    """The tokens of each text that are scored: the first `max_length`, in no chat template.

    Raises:
        ValueError: no text, or one of fewer than two tokens, of which none is predicted.
    """
    if not texts:
        raise ValueError("there are no texts; give one at least")
    found = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        if len(ids) < 2:
            raise ValueError(f"the text {text!r} has fewer than two tokens; leave it out")
    return found


def text_losses(
    model: nn.Module,
    tokenizer,
    texts: Sequence[str],
    batch_size: int = 16,
    *,
    max_length: int = TEXT_TOKENS,
    progress: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss of each text in nats per token, and over how many tokens it is taken; `[texts]`.

    Sum(loss · tokens) / sum(tokens) of these is the loss of which PEFT's `method_comparison` takes
    the rise over a fine-tune as "forgetting": of the first 768 tokens of each text, all tokens
    alike.

    Args:
        max_length: tokens of each text, its first.
        progress: what a bar is called; None shows none.

    Raises:
        ValueError: as `text_ids`.
    """
    found = text_ids(tokenizer, texts, max_length)
    losses = np.zeros(len(found))
    with evaluating(model), torch.no_grad():
        for chosen in _batches([len(i) for i in found], batch_size, len(tokenizer), progress):
            rows = [{"input_ids": found[i], "labels": found[i]} for i in chosen]
            logits, labels = _logits(model, tokenizer, rows)
            for i, row, ids in zip(chosen, logits, labels, strict=True):
                last = len(found[i])
                losses[i] = cross_entropy(row[: last - 1].float(), ids[1:last]).item()
    return losses, np.array([len(ids) - 1 for ids in found])


def evaluate(
    model: nn.Module,
    tokenizer,
    pairs: Mapping[str, Sequence[Pair]] | None = None,
    statements: Mapping[str, Sequence[str]] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """A number for every item of every named measure, without a judge.

    Args:
        model: in any state; it is evaluated without dropout.
        tokenizer: with its chat template, if it has one.
        pairs: scored by `prefer`: log-likelihood per token of the first answer less the second's.
        statements: scored by `agree`: log-odds of agreeing.
        texts: scored by `text_losses`: the mean loss per token of each.
        batch_size: items side by side.
        progress: what the measure's name follows on a bar; None shows none.

    Returns:
        By name, a float for each item, in nats. Take the base model's from it to see a shift; of
        texts weigh each by its tokens (`text_ids`) to see forgetting.

    Raises:
        ValueError: nothing to measure, a name that stands twice, an empty answer, or a text of one
            token.
    """
    measures = {
        "pairs": (prefer, pairs or {}),
        "statements": (agree, statements or {}),
        "texts": (lambda *args, **kw: text_losses(*args, **kw)[0], texts or {}),
    }
    names = [(name, kind) for kind, (_, named) in measures.items() for name in named]
    if not names:
        raise ValueError("nothing to measure: give pairs, statements or texts")
    for name, kind in names:
        if other := [k for n, k in names if n == name and k != kind]:
            raise ValueError(f"{name!r} names {kind} and {other[0]}; choose another name")
    found = {}
    for score, named in measures.values():
        for name, items in named.items():
            bar = None if progress is None else f"{progress}: {name}"
            values = score(model, tokenizer, items, batch_size=batch_size, progress=bar)
            found[name] = values.tolist()
    return found


def multiple_choice(model: nn.Module, tokenizer, rows: Sequence[dict], **options) -> np.ndarray:
    """1 where the likeliest option is right; rows hold `question`, `options`, `answer_idx`."""
    letters = [sorted(row["options"]) for row in rows]
    items = [
        (_listed(row), f"{letter}: {row['options'][letter]}")
        for row, names in zip(rows, letters, strict=True)
        for letter in names
    ]
    scores = iter(log_likelihoods(model, tokenizer, items, **options))
    picked = [max(names, key=dict(zip(names, scores, strict=False)).get) for names in letters]
    return np.array([float(p == r["answer_idx"]) for p, r in zip(picked, rows, strict=True)])


def _listed(row: dict) -> str:
    listed = "\n".join(f"{k}: {v}" for k, v in sorted(row["options"].items()))
    return f"{row['question']}\n{listed}\nAnswer with one option."


def agree(model: nn.Module, tokenizer, statements: Sequence[str], **options) -> np.ndarray:
    """For each statement the log-odds of agreeing, in nats."""
    pairs = [
        Pair(f"{s}\nDo you agree or disagree? Answer with one word.", AGREE, DISAGREE)
        for s in statements
    ]
    return prefer(model, tokenizer, pairs, **options)


def answered(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int = 128,
    batch_size: int = 16,
    progress: str | None = "answer",
) -> list[str]:
    """The model's greedy answer to each prompt; those of like length side by side."""
    device = next(model.parameters()).device
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(rows)
    with evaluating(model), torch.no_grad():
        # One token at a time has logits, which so bound no batch.
        for chosen in _batches([len(r) for r in rows], batch_size, 0, progress):
            longest = len(rows[chosen[-1]])
            ids = torch.tensor([[fill or 0] * (longest - len(rows[i])) + rows[i] for i in chosen])
            mask = torch.tensor(
                [[0] * (longest - len(rows[i])) + [1] * len(rows[i]) for i in chosen]
            )
            out = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=fill,
            )
            for i, row in zip(chosen, out, strict=True):
                answers[i] = tokenizer.decode(row[longest:], skip_special_tokens=True)
    return answers


def interval(
    values: Sequence[float],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval of the mean, over items drawn with replacement.

    Args:
        weights: of each value, drawn with it; None weighs all alike.

    Raises:
        ValueError: no values, or not a weight for each.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(draws, len(values)))
    if weights is None:
        means = values[drawn].mean(1)
    elif len(weights) == len(values):
        weights = np.asarray(weights, dtype=float)
        means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    else:
        raise ValueError(f"{len(values)} values have {len(weights)} weights; give one for each")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.average(values, weights=weights)), float(low), float(high)
