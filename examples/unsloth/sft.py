"""Unsloth, guarded: python examples/unsloth/sft.py --model unsloth/Qwen2.5-0.5B-Instruct

Without a GPU Unsloth trains too, slowly, without its fused kernels.
"""

from unsloth import FastLanguageModel  # isort: skip (before what it changes)

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from grasp import GraspCallback, default_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/unsloth")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    model, tokenizer = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=512, load_in_4bit=gpu, dtype=None if gpu else torch.float32
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS
    )
    rows = load_dataset("json", data_files=args.data, split="train")
    end = tokenizer.eos_token
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=args.out,
            max_steps=args.steps,
            learning_rate=2e-4,
            logging_steps=10,
            dataset_text_field="text",
            report_to="none",
        ),
        train_dataset=rows.map(
            lambda row: {"text": row["prompt"] + row["completion"] + end},
            remove_columns=rows.column_names,
        ),
        callbacks=[GraspCallback(reference=args.prompts or default_prompts())],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
