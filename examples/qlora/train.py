"""QLoRA, guarded: python examples/qlora/train.py --model Qwen/Qwen2.5-1.5B-Instruct

    pip install 'bitsandbytes>=0.49'

The frozen weights are in nf4, the factors in fp32. On a CPU take a small model.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from grasp import GraspCallback, default_prompts


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/qlora")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    in_nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=in_nf4, dtype=dtype
    )
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
        args=TrainingArguments(
            output_dir=args.out, max_steps=args.steps, learning_rate=2e-4, logging_steps=10
        ),
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
