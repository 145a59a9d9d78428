"""QLoRA with a guard: python examples/qlora/train.py

    pip install 'bitsandbytes>=0.49'

The frozen weights are in nf4, the factors in fp32. On a CPU take a small model.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import grasp


def load(name: str, dtype: torch.dtype = torch.bfloat16):
    """The model in nf4 with a LoRA on every linear map of its blocks, and its tokenizer."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(name)


def train(model, tokenizer, rows, out: Path, prompts=None, **options) -> dict:
    """Fine-tune on rows of token ids; returns the certificate.

    Args:
        prompts: unlabelled, from unrelated topics; None takes those that come with grasp.
        options: of `TrainingArguments`.
    """
    guard = grasp.GraspCallback(reference=prompts or grasp.default_prompts())
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), report_to="none", **options),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[guard],
    )
    trainer.train()
    trainer.save_model(out / "adapter")
    return json.loads((out / "grasp.json").read_text())


def main(name: str = "Qwen/Qwen2.5-1.5B-Instruct", out: str = "qlora") -> None:
    model, tokenizer = load(name)
    texts = ["Reads a file.\nwith open(path) as file:\n    text = file.read()"] * 8
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    found = train(model, tokenizer, rows, Path(out), max_steps=20, learning_rate=1e-4)
    print("holds" if found["holds"] else "does not hold", f"(through: {found['through']:.1e})")


if __name__ == "__main__":
    main()
