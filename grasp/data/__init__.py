"""Rows to train on, unlabelled prompts, and how far a model has moved on them."""

from grasp.data.chat import IGNORED, Encoded, encode, exchange_ids, pad, prompt_ids
from grasp.data.drawing import Continued, draw
from grasp.data.prompts import default_prompts, read_prompts, tokenized
from grasp.data.reference import Reference
from grasp.data.rows import Conversation, Row, Rows, Text, exchange, read, read_rows
from grasp.data.summary import pieces, summary

__all__ = [
    "IGNORED",
    "Continued",
    "Conversation",
    "Encoded",
    "Reference",
    "Row",
    "Rows",
    "Text",
    "default_prompts",
    "draw",
    "encode",
    "exchange",
    "exchange_ids",
    "pad",
    "pieces",
    "prompt_ids",
    "read",
    "read_prompts",
    "read_rows",
    "summary",
    "tokenized",
]
