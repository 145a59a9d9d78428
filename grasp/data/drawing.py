"""Continuations of prompts, drawn from a model.

    u ~ U(0, 1), the token t with the least Σ_{s ≤ t} p(s) > u

The u of a prompt come from the seed and its place alone, so that what is drawn does not depend on
which prompts run side by side.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from grasp.data.chat import IGNORED
from grasp.data.prompts import tokenized
from grasp.model import evaluating, partitions, processes, resting, sharding
from grasp.progress import Stage

Continued = tuple[list[int], list[int]]  # token ids, and labels: -100 on the prompt
See = Callable[[Tensor, list[int]], None]
Done = Callable[[list[int], list[list[int]]], None]
KEPT = 2**30  # bytes of keys, values and logits of the prompts that run side by side, about
MOST = 256  # of them
FEW = 48  # on a processor, which more make no faster: what is drawn can be kept the sooner


def draw(
    model: nn.Module,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer=None,
    *,
    tokens: int = 96,
    seed: int = 0,
    see: See | None = None,
    known: Mapping[int, list[int]] | None = None,
    done: Done | None = None,
) -> list[Continued]:
    """Each prompt with a continuation drawn from the model, up to an end token.

    Args:
        model: any decoder, in its own dtype and on its own device.
        prompts, tokenizer: as `Reference`.
        tokens: the most that are drawn for each.
        seed: of what is drawn.
        see: is shown the logits `[n, vocabulary]` that tokens are drawn by, a step at a time, and
            which prompts they are of.
        known: tokens that were drawn before, by the prompt; these are not drawn again.
        done: is shown which prompts were continued side by side, and by what, as soon as they are.

    Returns:
        For each prompt its token ids with the continuation's, and labels, -100 on the prompt.

    Raises:
        ValueError: no prompts, strings without a tokenizer, ids that the model does not know, more
            tokens than it takes, or a model that predicts none.
    """
    rows = tokenized(prompts, tokenizer)
    if sharding.is_split(model):  # processes that ran it on other prompts would wait for ever
        rows = processes.object_from_first(rows)
    _check_ids(model, rows, tokens)
    drawn = torch.rand(len(rows), tokens, generator=torch.Generator().manual_seed(seed))
    answers = dict(known or {})
    most = min(MOST, FEW) if next(model.parameters()).device.type == "cpu" else MOST
    groups = list(_together(rows, tokens, most, *_row_bytes(model)))  # of all, known or not
    groups = [chosen for chosen in groups if not all(i in answers for i in chosen)]
    work = sum(len(chosen) * _steps([rows[i] for i in chosen], tokens) for chosen in groups)
    what = f"Drawing the model's answers to {len(rows)} prompts"
    with evaluating(model), resting(model), torch.no_grad(), Stage(what, work, "tokens") as stage:
        for chosen in groups:
            shown = None if see is None else partial(_of_chosen, see, chosen)
            found = _continued(model, [rows[i] for i in chosen], drawn[chosen], stage, shown)
            answers |= dict(zip(chosen, found, strict=True))
            if done is not None:
                done(chosen, found)
    return [(row + answers[i], [IGNORED] * len(row) + answers[i]) for i, row in enumerate(rows)]


def _together(
    rows: Sequence[Sequence[int]], tokens: int, at_most: int, each: int, logits: int
) -> Iterator[list[int]]:
    """Which rows run side by side: as many as there is room for, by the bytes that they take.

    Of like length, so that few steps only read a prompt. A step reads all weights, for few rows as
    for many, so they are as many each time.

    Args:
        at_most: so many.
        each, logits: bytes of a token's keys and values, and of a position's logits.
    """
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while waiting:
        longest = len(rows[waiting[0]]) + tokens
        most = each * (len(rows[waiting[-1]]) + tokens) + logits
        times = max(-(-len(waiting) * most // KEPT), -(-len(waiting) // at_most))
        chosen: list[int] = []
        for i in waiting[: -(-len(waiting) // times)]:
            size = each * (len(rows[i]) + tokens) + logits
            if chosen and (len(rows[i]) > longest or size * (len(chosen) + 1) > KEPT):
                break
            chosen.append(i)
        waiting = waiting[len(chosen) :]
        yield chosen


def _steps(rows: Sequence[Sequence[int]], tokens: int) -> int:
    """Runs of the model in which rows side by side are read and continued."""
    lengths = [len(row) for row in rows]
    return max(lengths) - min(lengths) + tokens


def _row_bytes(model: nn.Module) -> tuple[int, int]:
    """Of a token's keys and values, of an attention as most have it; of a position's logits."""

    def number(name: str, otherwise: int) -> int:
        found = getattr(config, name, None)
        return found if isinstance(found, int) and found > 0 else otherwise

    config = model.config.get_text_config()
    heads = number("num_attention_heads", 1)
    width = number("head_dim", number("hidden_size", 4096) // heads)
    layers, shared = number("num_hidden_layers", 32), number("num_key_value_heads", heads)
    size = max(2, next(model.parameters()).element_size())
    logits = 16 * number("vocab_size", 2**17)  # in fp32, their shares and sums beside them
    return 2 * layers * shared * width * size, logits


def _of_chosen(see: See, chosen: Sequence[int], logits: Tensor, places: list[int]) -> None:
    see(logits, [chosen[i] for i in places])


def _continued(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    drawn: Tensor,
    stage: Stage,
    see: See | None,
) -> list[list[int]]:
    """What the model says after each row: `drawn [rows, tokens]` picks it.

    All are read from the shortest row's end on, a token of each at a time: the next of its own, or
    one that is picked. So rows of any lengths share a cache, and none is padded.
    """
    tokens, lengths = drawn.shape[1], torch.tensor([len(row) for row in rows])
    text = torch.zeros(len(rows), int(lengths.max()) + tokens, dtype=torch.long)
    for line, row in zip(text, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    from grasp.data.room import give_room  # which loads transformers

    device, last = next(model.parameters()).device, _last_logits(model)
    ends, over = _ends(model), torch.zeros(len(rows), dtype=torch.bool)
    cache, ran, at = None, 0, int(lengths.min())
    while not over.all():
        step = text[:, ran:at].to(device)
        out = model(input_ids=step, past_key_values=cache, use_cache=True, **last)
        if getattr(out, "logits", None) is None or out.logits.ndim != 3:
            raise _predicts_nothing(model)
        if cache is None and (cache := getattr(out, "past_key_values", None)) is not None:
            give_room(cache, text.shape[1])
        ran = at if cache is not None else 0  # a model without such a cache reads all again
        count = at - lengths  # of each row's tokens that are drawn so far
        asked = drawn.gather(1, count.clamp(0, tokens - 1)[:, None])
        (picked,) = processes.from_first([_pick(out.logits[:, -1], asked.to(device)).cpu()])
        text[:, at] = torch.where(count < 0, text[:, at], picked)
        answering = (count >= 0) & ~over
        if see is not None and answering.any():
            see(out.logits[answering.to(device), -1], answering.nonzero()[:, 0].tolist())
        stage.update(len(rows))
        over |= answering & torch.isin(text[:, at], ends) | (count + 1 >= tokens)
        at += 1
    stage.update(len(rows) * (text.shape[1] - at))  # what none of them says
    said = [line[n : n + tokens] for line, n in zip(text, lengths.tolist(), strict=True)]
    return [line[: _first(torch.isin(line, ends)) + 1].tolist() for line in said]


def _pick(logits: Tensor, drawn: Tensor) -> Tensor:
    """The tokens `[rows]` of logits `[rows, vocabulary]` at which the shares reach `drawn`."""
    shares = logits.float().softmax(-1).cumsum(-1)
    return torch.searchsorted(shares, drawn * shares[:, -1:], right=True).clamp_max(
        logits.shape[1] - 1
    )[:, 0]


def _first(found: Tensor) -> int:
    """Where the first True is; the last place if there is none."""
    return int(found.int().argmax()) if bool(found.any()) else len(found) - 1


def _ends(model: nn.Module) -> Tensor:
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return torch.tensor([end] if isinstance(end, int) else list(end or []), dtype=torch.long)


def _last_logits(model: nn.Module) -> dict[str, Tensor | int]:
    """What asks a model for the last position's logits alone, where it can be asked.

    By an index, which takes a copy: a slice of hidden states is not contiguous, and torch then
    multiplies them on a CPU with a copy of the whole head for each row.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters.get("logits_to_keep")
    if known is None:
        return {}
    takes_index = "Tensor" in str(known.annotation)
    return {"logits_to_keep": torch.tensor([-1]) if takes_index else 1}


def _check_ids(model: nn.Module, rows: list[list[int]], tokens: int) -> None:
    embeddings = model.get_input_embeddings()
    if embeddings is None:
        raise _predicts_nothing(model)
    known = partitions.shape(embeddings.weight)[0]
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


def _predicts_nothing(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} gives no distribution over the next token, which a reference "
        "compares; give subspaces (from grasp.discover) in place of it"
    )
