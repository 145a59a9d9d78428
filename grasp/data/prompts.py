"""Prompts in whatever form people have them, as token ids."""

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path

from torch import Tensor

from grasp.data.rows import prompt_ids, read_prompts


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
