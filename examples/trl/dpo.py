"""TRL's DPOTrainer, guarded: python examples/trl/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from grasp import GraspCallback, default_prompts


def main(arguments: list[str] | None = None) -> DPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/trl-dpo")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    rows = load_dataset("json", data_files=args.data, split="train")
    trainer = DPOTrainer(
        model=args.model,
        args=DPOConfig(
            output_dir=args.out,
            max_steps=args.steps,
            learning_rate=1e-4,
            logging_steps=10,
            bf16=torch.cuda.is_available(),
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows.rename_column("completion", "chosen"),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[GraspCallback(reference=args.prompts or default_prompts())],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
