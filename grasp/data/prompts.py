"""Prompts in whatever form people have them, as token ids."""

from collections.abc import Mapping
from importlib import resources
from numbers import Integral
from pathlib import Path

from torch import Tensor

from grasp.data.chat import opening_ids, prompt_ids


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
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"{where} has no turn of the user; give one, or a string")
    try:
        return opening_ids(tokenizer, messages[: last + 1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_message(value) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_id(value) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
