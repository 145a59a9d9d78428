"""A LoRA put off what unrelated prompts use before training, and nothing around the training:

python examples/transformers/frozen.py --model MODEL
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import grasp


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/frozen")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    prompts = args.prompts or grasp.default_prompts()
    grasp.init_lora_null(model, prompts, tokenizer=tokenizer)  # from here on A stays as it is
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token),
        remove_columns=rows.column_names,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out, max_steps=args.steps, learning_rate=1e-3, logging_steps=10
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
