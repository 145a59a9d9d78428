"""TRL's SFTTrainer, guarded, watched in TensorBoard:

python examples/trl/sft.py --model Qwen/Qwen2.5-0.5B-Instruct
tensorboard --logdir runs/trl-sft
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from grasp import GraspCallback, default_prompts


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/trl-sft")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    rows = load_dataset("json", data_files=args.data, split="train")
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.out,
            max_steps=args.steps,
            learning_rate=2e-4,
            logging_steps=10,
            report_to="tensorboard",  # pip install tensorboard
            bf16=torch.cuda.is_available(),
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[GraspCallback(reference=args.prompts or default_prompts())],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
