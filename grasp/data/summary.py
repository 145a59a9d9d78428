"""What was read, in words, and what a model sees of it."""

from collections.abc import Iterator

from grasp.data.chat import IGNORED, Encoded, Tokens
from grasp.data.rows import Rows, Text


def summary(read: Rows, encoded: Encoded, tokenizer, max_length: int) -> list[str]:
    """What is used of what was read, what not, and why; a line each."""
    forms = ", ".join(f"{n} of {form}" for form, n in read.forms.items())
    said = [f"{len(read.rows)} rows read: {forms}."]
    if read.unread:
        said.append(f"Not read: the columns {', '.join(read.unread)}.")
    if encoded.cut:
        said.append(
            f"{_rows(encoded.cut)} longer than {max_length} tokens and cut at the end; raise "
            "max_length to keep all."
        )
    if encoded.dropped:
        said.append(
            f"{_rows(encoded.dropped)} left out: what is asked fills {max_length} tokens; raise "
            "max_length."
        )
    parts = len(encoded.rows) - len(set(encoded.of))
    if parts:
        said.append(
            f"{parts} more rows to learn from, since the chat template shows earlier answers "
            "otherwise than later ones: each is learned as the model will give it."
        )
    if not tokenizer.chat_template and not all(isinstance(r, Text) for r in read.rows):
        said.append(
            "The model has no chat template: a blank line follows what is asked, an end the answer."
        )
    if tokenizer.chat_template and any(isinstance(r, Text) for r in read.rows):
        said.append(
            "Text, and prompt and completion, are learned as they stand, outside the model's chat "
            "template; give messages, or question and answer, for turns of a chat."
        )
    return said


def pieces(row: Tokens, tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of a row in pieces, and whether each is learned."""
    ids, labels = row["input_ids"], [t != IGNORED for t in row["labels"]]
    start, told = 0, ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or labels[end] != labels[start]:
            text = tokenizer.decode(ids[:end])  # in one: a word alone may lose its blank
            yield text[len(told) :], labels[start]
            start, told = end, text


def _rows(which: list[int]) -> str:
    """How many, and which is the first."""
    verb = "is" if len(which) == 1 else "are"
    noun = "row" if len(which) == 1 else "rows"
    return f"{len(which)} {noun} (the first is row {which[0]}) {verb}"
