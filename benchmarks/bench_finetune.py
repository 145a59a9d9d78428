"""One LoRA step of a real model, plain and guarded, side by side: the guard's share of a step.

python benchmarks/bench_finetune.py [--device cpu|cuda] [--model NAME] [--quick]
"""

import sys

import torch
from gpu.step import grown, one_step
from harness import main, timed

from grasp.data import default_prompts
from grasp.guard import Guard
from grasp.model import load_model
from grasp.study.finetune import add_lora
from grasp.study.settings import Settings

NAME = "smollm2-135m-instruct"
ROWS, TOKENS = 8, 128


def measure(device: torch.device, quick: bool) -> list[dict]:
    name = sys.argv[sys.argv.index("--model") + 1] if "--model" in sys.argv else NAME
    settings = Settings(model=name, data="-", output_dir="-")
    steps = {}
    for guarded in (False, True):
        model, tokenizer = load_model(name)
        model = add_lora(model, settings).to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.randint(100, 1000, (ROWS, TOKENS), device=device)
        step = one_step(
            lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss, optimizer
        )
        if guarded:
            prompts = default_prompts()[: 16 if quick else None]
            options = {"tokenizer": tokenizer, "rank": 4, "every": 1, "refresh": 1, "grow": 4}
            guard = grown(Guard(model, reference=prompts, optimizer=optimizer, **options), step)
        steps["guarded" if guarded else "plain"] = step
    times = timed(steps, device, 20 if device.type == "cuda" else 7, wall=True)
    ranks = [m["rank"] for m in guard.leak().values()]
    return [
        {
            "model": name,
            "batch": [ROWS, TOKENS],
            "lora_rank": settings.lora_r,
            "mean_rank": sum(ranks) / len(ranks),
            "plain_ms": times["plain"],
            "guarded_over_plain": times["guarded"] / times["plain"],
        }
    ]


if __name__ == "__main__":
    main(__doc__, "finetune", measure)
