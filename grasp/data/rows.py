"""Rows and prompts: read, checked at the door, and turned into tokens, the loss on the answer."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    prompt: str
    answer: str
    system: str = ""


def read_rows(path: Path | str, limit: int | None = None) -> list[Row]:
    """Rows of a `.jsonl` file, `.gz` too: `messages` (one exchange), or `prompt` and `answer`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, no JSON lines, or a line has neither form; says which line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}")
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # a byte-order mark goes
            for number, line in enumerate(file, 1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except (gzip.BadGzipFile, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path} can't be read as JSON lines ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no rows; give a .jsonl file with one example a line")
    return rows


def default_prompts() -> list[str]:
    """The shipped unlabelled prompts, 192: half ask for facts, half for advice, on everyday topics.

    None is on medicine, money, driving, safety, pets, family, work or the law: leave out more where
    they are what you train on.
    """
    text = resources.files("grasp").joinpath("assets/prompts.txt").read_text(encoding="utf-8")
    return text.split("\n")[:-1]


def read_prompts(path: Path | str | None) -> list[str]:
    """One prompt a line; None gives `default_prompts`.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing in it.
    """
    if path is None:
        return default_prompts()
    if not Path(path).exists():
        raise FileNotFoundError(f"no reference prompts at {path}")
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").split("\n")]
    prompts = [p for p in prompts if p]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write some dozens, one a line")
    return prompts


def _row(line: str, where: str) -> Row:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg})") from error
    if isinstance(content, dict) and "messages" in content:
        row = _exchange(content["messages"], where)
    elif isinstance(content, dict):
        answer = content.get("answer", content.get("completion"))
        row = Row(content.get("prompt"), answer, content.get("system") or "")
    else:
        row = Row(None, None)
    if not (isinstance(row.prompt, str) and isinstance(row.answer, str) and row.answer.strip()):
        raise ValueError(
            f"{where}: needs messages with a user and an assistant turn, or prompt and answer"
        )
    return row


def _exchange(messages, where: str) -> Row:
    """One system turn at most, a user's and an assistant's: what a row holds.

    Raises:
        ValueError: any other turns, which would be lost.
    """
    shaped = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
    )
    roles = [m.get("role") for m in messages] if shaped else None
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"{where}: its turns are {', '.join(map(str, roles)) if roles else messages!r}; give "
            "one of the user and one of the assistant, after a system's if there is one (split a "
            "longer conversation into rows)"
        )
    said = {m["role"]: m["content"] for m in messages}
    return Row(said["user"], said["assistant"], said.get("system", ""))


def prompt_text(tokenizer, prompt: str, system: str = "") -> str:
    """The prompt as the model was taught to see it: its chat template where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{system}\n\n{prompt}" if system else prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer, prompt: str, system: str = "") -> list[int]:
    chat = bool(getattr(tokenizer, "chat_template", None))
    text = prompt_text(tokenizer, prompt, system)
    return tokenizer(text, add_special_tokens=not chat)["input_ids"]


def answer_ids(tokenizer, answer: str) -> list[int]:
    """Tokens of the answer, closed by the end-of-turn token where the model is a chat model."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids + [tokenizer.eos_token_id] if chat else ids


def encode(rows: Sequence[Row], tokenizer, max_length: int = 512) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` for each row; the loss is on the answer alone.

    Raises:
        ValueError: no rows, or none whose prompt leaves room for an answer in `max_length`.
    """
    if not rows:
        raise ValueError("there are no rows to train on")
    encoded = []
    for row in rows:
        prompt = prompt_ids(tokenizer, row.prompt, row.system)
        ids = (prompt + answer_ids(tokenizer, row.answer))[:max_length]
        if len(ids) > len(prompt):
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            encoded.append({"input_ids": ids, "labels": labels})
    if not encoded:
        raise ValueError(f"every prompt is longer than max_length={max_length}; raise it")
    return encoded


def pad(rows: Sequence[dict[str, list[int]]], pad_id: int = 0) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids`, `labels` and `attention_mask`, `[rows, tokens]`."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([list(r[key]) + [value] * (longest - len(r[key])) for r in rows])

    ids = padded("input_ids", pad_id)
    lengths = torch.tensor([len(r["input_ids"]) for r in rows])
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "labels": padded("labels", IGNORED), "attention_mask": mask}
