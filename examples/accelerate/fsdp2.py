"""A loop of one's own under accelerate's FSDP2, guarded; one process a GPU:

accelerate launch --config_file examples/accelerate/fsdp2.yaml \\
    examples/accelerate/fsdp2.py --model MODEL
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/fsdp2")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    accelerator = Accelerator()
    torch.manual_seed(0)  # every process begins with the same LoRA
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = load_dataset("json", data_files=args.data, split="train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    reference = args.prompts or grasp.default_prompts()
    model.train()
    with grasp.Guard(model, reference=reference, tokenizer=tokenizer, optimizer=optimizer) as guard:
        for step in range(args.steps):
            place = step * accelerator.num_processes + accelerator.process_index
            row = rows[place % len(rows)]
            text = row["prompt"] + row["completion"] + tokenizer.eos_token
            ids = tokenizer(text, return_tensors="pt").input_ids.to(accelerator.device)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    found = guard.certificate()  # all processes ask together, as for the weights
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out, state_dict=weights)
        Path(args.out, "grasp.json").write_text(json.dumps(found, indent=2))
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
