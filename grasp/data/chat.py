"""Rows as a model sees them: its chat template, tokens, and which of them the loss is on."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from grasp.data.rows import Conversation, Message, Row, Text, exchange
from grasp.progress import Stage

IGNORED = -100  # label of tokens without loss
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}{% endfor %}"
)
"""For models that were taught none: a blank line after what is asked, an end after an answer."""

Tokens = dict[str, list[int]]  # input_ids, labels


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, and what became of those that are too long."""

    rows: list[Tokens]
    of: list[int]
    """Which row each came of: of one whose template forgets a turn's beginning, several come."""
    cut: list[int]
    """Rows that lost their end."""
    dropped: list[int]
    """Rows of which nothing is left to learn, since what is asked fills `max_length`."""


def encode(rows: Sequence[Row], tokenizer, max_length: int | None = 512) -> Encoded:
    """Token ids and labels of rows; the loss is on the answers, each with its own end of turn.

    What is an answer a template's `{% generation %}` marks say, where it has them; else it is what
    a conversation gains by a turn:

        tokens(turns 0 … i)  less their common beginning with  tokens(turns 0 … i − 1, opening i)

    without the blanks after the turn's end. Where a template shows a turn otherwise once others
    follow it (a thought that is taken out, say), its answer makes a row of its own.

    Args:
        rows: from `read_rows`.
        tokenizer: with the model's chat template; without one, `PLAIN` stands in.
        max_length: in tokens; what is longer is cut at its end. None cuts nothing.

    Raises:
        ValueError: no rows, one that the template refuses or leaves words out of, or none that
            leaves room for an answer in `max_length`.
    """
    if not rows:
        raise ValueError("there are no rows to train on")
    found, of, cut, dropped = [], [], [], []
    for index, parts in enumerate(_each(rows, tokenizer)):
        kept = [{k: ids[:max_length] for k, ids in p.items()} for p in parts]
        kept = [p for p in kept if any(t != IGNORED for t in p["labels"])]
        if any(len(p["input_ids"]) > (max_length or len(p["input_ids"])) for p in parts):
            (cut if kept else dropped).append(index)
        elif not kept:
            raise ValueError(f"row {index}: the model's chat template shows nothing of its answers")
        found += kept
        of += [index] * len(kept)
    if not found:
        raise ValueError(f"every prompt is longer than max_length={max_length}; raise it")
    return Encoded(found, of, cut, dropped)


def prompt_ids(tokenizer, prompt: str, system: str = "") -> list[int]:
    """Tokens of a prompt, up to where the model's answer begins."""
    return opening_ids(tokenizer, exchange(prompt, "", system).messages[:-1])


def opening_ids(tokenizer, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
    """Tokens of turns, up to where the assistant's next one begins."""
    return _ids(tokenizer, _shown(tokenizer, messages, tools, opening=True))


def exchange_ids(
    tokenizer, prompt: str, answer: str, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of an answer to it, with its end of turn where it is `ended`."""
    (part,) = _tokens(exchange(prompt, answer), tokenizer)
    ids, labels = part["input_ids"], part["labels"]
    learned = [i for i, t in enumerate(labels) if t != IGNORED]
    start, end = learned[0], learned[-1] + 1
    if not ended:
        ends = set(tokenizer.get_added_vocab().values())
        while end > start + 1 and ids[end - 1] in ends:
            end -= 1
    return ids[:start], ids[start:end]


def pad(rows: Sequence[Tokens], pad_id: int = 0) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids`, `labels` and `attention_mask`, `[rows, tokens]`."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([list(r[key]) + [value] * (longest - len(r[key])) for r in rows])

    ids = padded("input_ids", pad_id)
    lengths = torch.tensor([len(r["input_ids"]) for r in rows])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "labels": padded("labels", IGNORED), "attention_mask": mask}


def _each(rows: Sequence[Row], tokenizer) -> Iterator[list[Tokens]]:
    with Stage("Turning rows into tokens", len(rows), "rows") as stage:
        for index, row in enumerate(rows):
            try:
                yield _tokens(row, tokenizer)
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from error
            stage.update()


def _tokens(row: Row, tokenizer) -> list[Tokens]:
    if isinstance(row, Text):
        return [_text_tokens(row, tokenizer)]
    row, text = _whole(row, tokenizer)
    marked = _marked(row, tokenizer)
    return _by_turns(row, tokenizer, text) if marked is None else [marked]


def _text_tokens(row: Text, tokenizer) -> Tokens:
    end = tokenizer.eos_token or ""
    text = row.prompt + row.answer
    ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
    start = _common(tokenizer(row.prompt)["input_ids"], ids) if row.prompt else 0
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _marked(row: Conversation, tokenizer) -> Tokens | None:
    """By the template's own marks, where it has them for every answer."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("tool_use" if row.tools else "default", template["default"])
    if not template or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    found = tokenizer.apply_chat_template(
        list(row.messages),
        tools=list(row.tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = found["input_ids"], found["assistant_masks"]
    spans = sum(m and not before for before, m in pairwise([0, *mask]))
    if spans < sum(m["role"] == "assistant" for m in row.messages):
        return None  # of some answers, calls of tools perhaps, it marks nothing
    start = 0
    if any(m["role"] == "assistant" for m in row.messages[: row.learned[0]]):
        before = opening_ids(tokenizer, row.messages[: row.learned[0]], row.tools)
        start = _common(before, ids)
    shown = enumerate(zip(ids, mask, strict=True))
    labels = [t if m and i >= start else IGNORED for i, (t, m) in shown]
    return {"input_ids": ids, "labels": labels}


def _by_turns(row: Conversation, tokenizer, text: str) -> list[Tokens]:
    """By what each answer adds to the turns before it."""
    whole = _ids(tokenizer, text)
    labels, alone = [IGNORED] * len(whole), []
    ends = set(tokenizer.get_added_vocab().values())
    for i in row.learned:
        before = opening_ids(tokenizer, row.messages[:i], row.tools)
        after = _ids(tokenizer, _up_to(i, row, tokenizer, text))
        start, shared = _common(before, after), _common(after, whole)
        end = _closed(after[:shared], ends, tokenizer)
        said = row.messages[i]["content"].strip()
        ended = bool(said) and said in tokenizer.decode(after[start:end]) and after[end - 1] in ends
        if end > start and (ended or end == _closed(after, ends, tokenizer)):
            labels[start:end] = after[start:end]
        else:
            end = _closed(after, ends, tokenizer)
            masked = [IGNORED] * start + after[start:end] + [IGNORED] * (len(after) - end)
            alone.append({"input_ids": after, "labels": masked})
    together = [{"input_ids": whole, "labels": labels}]
    return alone + together if any(t != IGNORED for t in labels) else alone


def _closed(ids: Sequence[int], ends: set[int], tokenizer) -> int:
    """Where an answer ends: before the blanks that follow its end of turn, if it has one."""
    last = len(ids)
    while last and not tokenizer.decode([ids[last - 1]]).strip():
        last -= 1
    return last if last and ids[last - 1] in ends else len(ids)


def _whole(row: Conversation, tokenizer) -> tuple[Conversation, str]:
    """The row in roles that the template knows, and its text, which has all of its words.

    Raises:
        ValueError: the template leaves some out.
    """
    text = _shown(tokenizer, row.messages, row.tools)
    if any(m["role"] == "developer" and m["content"].strip() not in text for m in row.messages):
        known = (dict(m, role="system") if m["role"] == "developer" else m for m in row.messages)
        row = replace(row, messages=tuple(known))
        text = _shown(tokenizer, row.messages, row.tools)
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant" and i not in row.learned:
            continue  # of what is not learned a template may take out thoughts
        here = _up_to(i, row, tokenizer, text) if i in row.learned else text
        for said in _words(message):
            if not any(form in here for form in _written(said)):
                raise ValueError(
                    f"the model's chat template leaves out what turn {i} ({message['role']}) says: "
                    f"{said[:60]!r}; give it in a form that the template knows"
                )
    names = (t.get("function", t).get("name", "") for t in row.tools)
    if missing := [n for n in names if n not in text]:
        raise ValueError(
            f"the model's chat template shows no tools, such as {missing[0]!r}; leave tools out"
        )
    return row, text


def _up_to(i: int, row: Conversation, tokenizer, text: str) -> str:
    """The text up to turn i, as it is before others follow."""
    last = i + 1 == len(row.messages)
    return text if last else _shown(tokenizer, row.messages[: i + 1], row.tools)


def _written(said: str) -> Iterator[str]:
    """Ways in which a template may write something: as it is, or inside JSON."""
    yield said
    yield from (json.dumps(said, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))


def _words(message: Message) -> list[str]:
    calls = (c.get("function", c) for c in message.get("tool_calls") or ())
    return [w for w in (message["content"].strip(), *(c.get("name", "") for c in calls)) if w]


def _shown(
    tokenizer, messages: Sequence[Message], tools: Sequence[dict], opening: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=None if tokenizer.chat_template else PLAIN,
            tokenize=False,
            add_generation_prompt=opening,
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(
            f"the model's chat template refuses turns of {roles} ({error}); give turns as it takes "
            "them"
        ) from error


def _ids(tokenizer, text: str) -> list[int]:
    # A template writes a text's special tokens itself.
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
