"""Rows to train on, out of the forms that people have them in."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp.data.files import examples
from grasp.progress import Stage

Message = dict[str, Any]  # role, content, and what else a chat template takes


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation; the loss is on the assistant's, from turn `first` on."""

    messages: tuple[Message, ...]
    first: int = 0
    tools: tuple[dict, ...] = ()
    """What the assistant may call, as JSON schemas."""

    @property
    def learned(self) -> list[int]:
        """Which turns the loss is on: one that opens the conversation answers nothing."""
        turns = range(max(self.first, 1), len(self.messages))
        return [i for i in turns if self.messages[i]["role"] == "assistant"]

    @property
    def prompt(self) -> str:
        """What the first of these answers."""
        before = self.messages[: self.learned[0]]
        return next((m["content"] for m in reversed(before) if m["role"] == "user"), "")

    @property
    def answer(self) -> str:
        return self.messages[self.learned[0]]["content"]

    def asked(self, instruction: str) -> "Conversation":
        """With an instruction before the user's first words."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] == "user"), None)
        if first is None:
            said = {"role": "user", "content": instruction}
            return replace(self, messages=(said, *self.messages), first=self.first + 1)
        turns = list(self.messages)
        turns[first] = dict(turns[first], content=f"{instruction} {turns[first]['content']}")
        return replace(self, messages=tuple(turns))


@dataclass(frozen=True)
class Text:
    """Text as it stands, in no chat template; the loss is on what follows the prompt."""

    prompt: str
    answer: str

    def asked(self, instruction: str) -> "Text":
        return replace(self, prompt=f"{instruction} {self.prompt}")


Row = Conversation | Text


@dataclass(frozen=True)
class Rows:
    """What was read of a source."""

    rows: list[Row]
    forms: dict[str, int]
    """How many rows have each form, by the columns it is known by."""
    unread: list[str]
    """Columns that no form has."""


ASKED = (  # columns of a question and of its answer, which become turns of a conversation
    ("prompt", "answer"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
BESIDE = ("system", "input", "context", "tools")  # read beside them
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
KNOWN = ("system", "developer", "user", "assistant", "tool")
FORMS = (
    "messages (or conversations), prompt and completion, prompt and answer, question and answer, "
    "instruction and output, or text"
)


def exchange(prompt: str, answer: str, system: str = "") -> Conversation:
    """A question and its answer as turns, after what the system says if it says something."""
    said = [{"role": "system", "content": system}] if system else []
    said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(said))


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]], limit: int | None = None
) -> list[Row]:
    """The rows that `read` finds."""
    return read(source, limit).rows


def read(source: str | Path | Iterable[Mapping[str, Any]], limit: int | None = None) -> Rows:
    """Rows of a file, a saved dataset or one on the hub (see `files.examples`), by their columns.

    | columns | what is learned |
    |---|---|
    | messages, or conversations (role / content, from / value), with tools | every answer |
    | prompt and completion, both messages | the completion's answers |
    | prompt and completion, both text | the completion, as it stands, as TRL has it |
    | prompt / question / query / instruction (input) and answer / response / output | the answer |
    | text | all of it |

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is empty, can't be read, or an example has no such form; says which.
    """
    rows: list[Row] = []
    forms: dict[str, int] = {}
    seen: set[str] = set()
    used: set[str] = set()
    with Stage(f"Reading {source if isinstance(source, (str, Path)) else 'rows'}"):
        for where, example in examples(source, limit):
            there = {k: v for k, v in example.items() if v is not None}
            names, row = _row(there, where)
            form = " and ".join(n for n in names if n not in BESIDE)
            forms[form] = forms.get(form, 0) + 1
            seen, used = seen | set(there), used | set(names)
            rows.append(row)
    if not rows:
        raise ValueError(f"{source} holds no rows; give one example a line, or a dataset of some")
    return Rows(rows, forms, sorted(seen - used))


def _row(example: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], Row]:
    """The row, and the columns that it is made of."""
    for name in ("messages", "conversations"):
        if name in example:
            messages = _messages(example[name], f"{where}: {name}")
            row = Conversation(messages, tools=_tools(example, where))
            return (name, "tools"), _checked(row, where)
    if "prompt" in example and "completion" in example:
        return ("prompt", "completion", "tools"), _completed(example, where)
    for asked, answered in ASKED:
        if asked in example and answered in example:
            return _asked(example, asked, answered, where)
    if "text" in example:
        return ("text",), Text("", _filled(example["text"], f"{where}: text"))
    have = f"the columns {', '.join(map(str, example))}" if example else "no columns"
    raise ValueError(f"{where}: has {have}; give {FORMS}")


def _asked(
    example: Mapping[str, Any], asked: str, answered: str, where: str
) -> tuple[tuple[str, ...], Row]:
    names = [asked, answered, "system"]
    if asked == "instruction":  # with what it is about
        names += [n for n in ("input", "context") if n in example]
    prompt, answer, system, *about = (_text(example.get(n, ""), f"{where}: {n}") for n in names)
    prompt = "\n\n".join([prompt, *filter(None, about)])
    return tuple(names), _checked(exchange(prompt, answer, system), where)


def _completed(example: Mapping[str, Any], where: str) -> Row:
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt, _filled(completion, f"{where}: completion"))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(
            f"{where}: of prompt and completion one is text and one is not; give both as text, or "
            "both as messages"
        )
    before = _messages(prompt, f"{where}: prompt")
    after = _messages(completion, f"{where}: completion")
    row = Conversation((*before, *after), len(before), _tools(example, where))
    return _checked(row, where)


def _checked(row: Conversation, where: str) -> Conversation:
    if not row.learned:
        raise ValueError(f"{where}: has no turn of the assistant to learn from; give one")
    if (last := row.messages[-1]["role"]) != "assistant":
        raise ValueError(
            f"{where}: ends with a turn of the {last}, which no answer follows; answer it, or "
            "leave that turn out"
        )
    for i in row.learned:
        message = row.messages[i]
        if not message["content"].strip() and not message.get("tool_calls"):
            raise ValueError(f"{where}: an answer is empty; leave the row out, or answer it")
    return row


def _messages(value, where: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where} is {str(value)[:60]!r}; give a list of turns")
    return tuple(_message(m, f"{where}, turn {i}") for i, m in enumerate(value))


def _message(value, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {str(value)[:60]!r}; give its role and its content")
    said = _stripped(value)
    role = said.pop("role", None)
    role = said.pop("from", role)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN:
        raise ValueError(f"{where} is by {role!r}; give one of {', '.join((*KNOWN, *ROLES))}")
    content = said.pop("value", said.pop("content", "" if said.get("tool_calls") else None))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(p, where) for p in content)
    if not isinstance(content, str):
        raise ValueError(f"{where} says {content!r:.60}; give text")
    if calls := said.get("tool_calls"):
        said["tool_calls"] = [_call(c, where) for c in calls]
    return {**said, "role": role, "content": content}


def _call(call, where: str) -> dict:
    """A call whose arguments are an object: some write them as JSON text, templates once more."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call is {str(call)[:60]!r}; give its name and arguments")
    inner = call.get("function", call)
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return dict(call)
        inner = {**inner, "arguments": parsed} if isinstance(parsed, dict) else inner
    return {**call, "function": inner} if "function" in call else dict(inner)


def _part(part, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"{where} holds {kind!r}, and only text can be learned from; leave it out")


def _tools(example: Mapping[str, Any], where: str) -> tuple[dict, ...]:
    tools = example.get("tools") or ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: tools is text, but no JSON ({error.msg})") from error
    if not isinstance(tools, Sequence) or not all(isinstance(t, Mapping) for t in tools):
        raise ValueError(f"{where}: tools is {str(tools)[:60]!r}; give a list of JSON schemas")
    return tuple(_stripped(t) for t in tools)


def _stripped(value):
    """Without the keys that a dataset's columns fill with None where a row has them not."""
    if isinstance(value, Mapping):
        return {k: _stripped(v) for k, v in value.items() if v is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_stripped(v) for v in value]
    return value


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {str(value)[:60]!r}; give text")
    return value


def _filled(value, where: str) -> str:
    if not _text(value, where).strip():
        raise ValueError(f"{where} is empty; leave the row out, or fill it")
    return value
