"""The page of an adapter: what it is, how it was trained and guarded, how to load it."""

from pathlib import Path
from typing import Any

from grasp.study.settings import GUARDED, Settings
from grasp.versions import versions

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

A LoRA on `{base}`, trained on {rows}. {kind}

## What it came to

{came_to}

## Load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "FOLDER_OF_THIS_ADAPTER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OF_THIS_ADAPTER")
```

It is a plain adapter: `peft` is all it needs, and it merges (`model.merge_and_unload()`).

## How it was trained

| setting | |
|---|---|
{settings}

Versions: {versions}.
"""
GUARD = (
    "It was guarded by [GRASP](https://arxiv.org/abs/2605.27676): training was kept off what the "
    "base model does on unrelated prompts, so that what it knew stays. `grasp.json` is the "
    "certificate: what was blocked in each matrix, and how much got through."
)
PLAIN = "It was trained without a guard (method: {method})."
SHOWN = (
    "method",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "read",
    "free_rank",
    "freeze_inputs",
    "rank",
    "seed",
)


def card(settings: Settings, base: str, steps: int, rows: int, came_to: list[str]) -> str:
    """The page, in Markdown, with what the hub reads of it in front.

    Args:
        base: the name that the base model loads by.
        came_to: lines of what the run came to.
    """
    guarded = settings.method in GUARDED
    shown: dict[str, Any] = {"steps": steps}
    shown |= {name: value for name in SHOWN if (value := getattr(settings, name)) is not None}
    return CARD.format(
        base=base,
        tags="\n".join(f"- {tag}" for tag in ("lora", *(["grasp"] if guarded else []))),
        title=Path(settings.output_dir).name,
        rows=f"{rows} rows of `{Path(settings.data).name}`",
        kind=GUARD if guarded else PLAIN.format(method=settings.method),
        came_to="\n".join(f"- {line}" for line in came_to),
        settings="\n".join(f"| `{name}` | {value} |" for name, value in shown.items()),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
