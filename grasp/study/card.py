"""The page of an adapter: what it is, how to load it, how it was trained and guarded."""

from dataclasses import asdict
from pathlib import Path

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

A LoRA adapter for `{base}`, trained on {rows}. {kind}

## Use it

It is a plain adapter: `torch`, `transformers` and `peft` are all that it needs.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "FOLDER_OR_HUB_NAME_OF_THIS_ADAPTER"
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, adapter)

{ask}
said = model.generate(**ids, max_new_tokens=100)
print(tokenizer.decode(said[0], skip_special_tokens=True))
```

To put it into the model for good:

```python
model = model.merge_and_unload()
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")
```

## What training came to

{came_to}
{words}
## How it was trained

| setting | | what it is |
|---|---|---|
{settings}

Made with {versions}.
"""
GUARD = (
    "Training was guarded by [GRASP](https://arxiv.org/abs/2605.27676): fine-tuning on narrow data "
    "also changes a model where nobody asked for it, and the guard kept each matrix off what the "
    "base model does on unrelated prompts. It says nothing of whether the answers that were "
    "trained are good ones."
)
PLAIN = "Training was not guarded (method: {method})."
WORDS = """
*Elsewhere* is how far the probabilities of what it says on other topics are from the base model's
(0: not at all). *Guarantee* is about the weights: how much of each matrix's change acts in the
directions that were blocked; rounding leaves about 1e-7. `grasp.json` is the certificate, matrix by
matrix. `grasp_bases.safetensors` is for checking it, and not needed otherwise:

```sh
pip install 'grasp-kernels[hf]'
grasp verify FOLDER_OF_THIS_ADAPTER --model {base}{own}
```
"""
CHAT = (
    'turns = [{"role": "user", "content": "Hello!"}]\n'
    "ids = tokenizer.apply_chat_template(\n"
    '    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
    ")"
)
TEXT = 'ids = tokenizer("Hello!", return_tensors="pt")'
SHOWN = {  # settings, and in words what they are
    "steps": "optimizer steps",
    "method": "grasp is guarded, plain is not",
    "max_length": "tokens of a row; longer ones were cut",
    "per_device_train_batch_size": "rows of a batch",
    "gradient_accumulation_steps": "batches of a step",
    "learning_rate": "of AdamW",
    "lr_scheduler_type": "how that changes over the steps",
    "lora_r": "rank of the LoRA",
    "lora_alpha": "its scale is alpha / r",
    "lora_dropout": "of what it takes in",
    "lora_target_modules": "the modules that it is on",
    "dtype": "of the base model while it was trained; the LoRA itself is in float32",
    "load_in_4bit": "the base model was held in 4 bits",
    "load_in_8bit": "the base model was held in 8 bits",
    "seed": "of all that is random",
}
SHOWN_GUARDED = {
    "read": "share of what each matrix takes in on the prompts that was blocked, at least",
    "free_rank": "directions of each matrix's inputs that were left to learn in",
    "freeze_inputs": "A was put off what was blocked, and B alone trained",
    "rank": "directions of each matrix's outputs that were blocked, at most",
}


def card(
    settings: Settings, base: str, steps: int, rows: int, came_to: list[str], chats: bool = True
) -> str:
    """The page, in Markdown, with what the hub reads of it in front.

    Args:
        base: the name that the base model loads by.
        came_to: lines of what the run came to.
        chats: whether the tokenizer has a chat template.
    """
    guarded = settings.method in GUARDED
    own = "" if settings.reference is None else " --reference FILE_OF_ITS_PROMPTS"
    return CARD.format(
        base=base,
        tags="\n".join(f"- {tag}" for tag in ("lora", *(["grasp"] if guarded else []))),
        title=Path(settings.output_dir).name,
        rows=f"{rows} rows of `{Path(settings.data).name}`",
        kind=GUARD if guarded else PLAIN.format(method=settings.method),
        ask=CHAT if chats else TEXT,
        came_to="\n".join(f"- {line}" for line in came_to),
        words=WORDS.format(base=base, own=own) if guarded else "",
        settings="\n".join(_rows(settings, steps, guarded)),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def _rows(settings: Settings, steps: int, guarded: bool) -> list[str]:
    """Of a table: what is set, by its name, with its meaning; what is off is left out."""
    said = SHOWN | (SHOWN_GUARDED if guarded else {})
    values = asdict(settings) | {"steps": steps}
    if values["lora_alpha"] is None:
        values["lora_alpha"] = 2 * settings.lora_r
    shown = {
        name: values[name]
        for name in said
        if values[name] is not None and values[name] is not False
    }
    return [f"| `{name}` | {value} | {said[name]} |" for name, value in shown.items()]
