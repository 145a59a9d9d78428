"""transformers' Trainer under DeepSpeed's ZeRO, guarded; one process a GPU:

torchrun --nproc_per_node 2 examples/deepspeed/train.py --model MODEL
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

from grasp import GraspCallback, default_prompts

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(FOLDER.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/deepspeed")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--deepspeed", default=str(FOLDER / "zero3.json"))
    args = parser.parse_args(arguments)
    # DeepSpeed is told first: under ZeRO-3 it splits the weights while they are loaded.
    told = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        learning_rate=2e-4,
        logging_steps=10,
        deepspeed=args.deepspeed,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token),
        remove_columns=rows.column_names,
    )
    trainer = Trainer(
        model=model,
        args=told,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[GraspCallback(reference=args.prompts or default_prompts())],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
