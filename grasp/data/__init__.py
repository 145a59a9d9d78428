"""Rows to train on, unlabelled prompts, and how far a model has moved on them."""

from grasp.data.drawing import Continued, draw
from grasp.data.prompts import tokenized
from grasp.data.reference import Reference
from grasp.data.rows import (
    IGNORED,
    Row,
    answer_ids,
    default_prompts,
    encode,
    pad,
    prompt_ids,
    prompt_text,
    read_prompts,
    read_rows,
)

__all__ = [
    "IGNORED",
    "Continued",
    "Reference",
    "Row",
    "answer_ids",
    "default_prompts",
    "draw",
    "encode",
    "pad",
    "prompt_ids",
    "prompt_text",
    "read_prompts",
    "read_rows",
    "tokenized",
]
