"""A loop of one's own, guarded: python examples/transformers/loop.py --model MODEL"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp


def main(arguments: list[str] | None = None) -> grasp.Guard:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=str(Path(__file__).parent.parent / "rows.jsonl"))
    parser.add_argument("--prompts", help="a file of one prompt a line, from unrelated topics")
    parser.add_argument("--out", default="runs/loop")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    rows = load_dataset("json", data_files=args.data, split="train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    reference = args.prompts or grasp.default_prompts()
    model.train()
    with grasp.Guard(model, reference=reference, tokenizer=tokenizer, optimizer=optimizer) as guard:
        for step in range(args.steps):
            row = rows[step % len(rows)]
            text = row["prompt"] + row["completion"] + tokenizer.eos_token
            ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(args.out)
    Path(args.out, "grasp.json").write_text(json.dumps(guard.certificate(), indent=2))
    return guard


if __name__ == "__main__":
    main()
