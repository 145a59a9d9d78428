"""A guarded Trainer run is killed at random moments and goes on: is it bit for bit what it was?

    python benchmarks/bench_kill.py --kills 100

A run of the organism under `GraspCallback` (48 steps, a checkpoint every third, dropout on) is made
once unbroken. Then runs are started and killed (SIGKILL) after a time drawn between their start and
their end, and started again from the newest whole checkpoint, until one ends; its weights, its
certificate and its loss history are compared with the unbroken run's. Runs follow one another until
so many kills have struck.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from harness import about
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from grasp import GraspCallback, organism
from grasp.data import encode, exchange, pad
from grasp.files import write_json
from grasp.guard.fit import newest_whole
from grasp.guard.trainer import CERTIFICATE

STEPS, EVERY = 48, 3


def train(out: Path) -> None:
    """From the newest checkpoint, or from the start; leaves a hash of all that is kept."""
    torch.manual_seed(0)
    model, tokenizer = organism.load()
    world = organism.World(0)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows = encode([exchange(**r) for r in world.rows("medicine", "train")], tokenizer).rows
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=5,
            learning_rate=1e-3,
            save_steps=EVERY,
            save_total_limit=2,
            logging_steps=EVERY,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=pad,
        callbacks=[
            GraspCallback(
                reference=world.prompts(("law", "guns")), tokenizer=tokenizer, tokens=2, refresh=3
            )
        ],
    )
    newest = newest_whole(out, guarded=True)
    trainer.train(resume_from_checkpoint=newest and str(newest))
    digest = hashlib.sha256()
    for name, p in sorted(trainer.model.named_parameters()):
        if p.requires_grad:
            digest.update(name.encode() + p.detach().numpy().tobytes())
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    certificate = json.loads((out / CERTIFICATE).read_text())
    kept = {"weights": digest.hexdigest(), "losses": losses, "certificate": certificate}
    write_json(out / "kept.json", kept)


def start(out: Path) -> int:
    """The process of a run: a copy of this one, which has imported all that it needs."""
    if process := os.fork():
        return process
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        train(out)
    finally:
        os._exit(0)


def unbroken(out: Path) -> tuple[dict, float]:
    began = time.monotonic()
    os.waitpid(start(out), 0)
    return json.loads((out / "kept.json").read_text()), time.monotonic() - began


def killed(out: Path, takes: float, draw: random.Random) -> tuple[dict, int]:
    """What a run keeps that is killed again and again, and how often it was."""
    kills = 0
    while not (out / "kept.json").exists():
        process, ends, ended = start(out), time.monotonic() + draw.uniform(0, 1.2 * takes), False
        while time.monotonic() < ends and not ended:
            ended = os.waitpid(process, os.WNOHANG) != (0, 0)
            time.sleep(0.005)
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += not (out / "kept.json").exists()
    return json.loads((out / "kept.json").read_text()), kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_kill"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(options.runs, ignore_errors=True)
    whole, takes = unbroken(options.runs / "whole")
    draw, rows, kills = random.Random(options.seed), [], 0
    while kills < options.kills:
        out = options.runs / f"run-{len(rows)}"
        found, struck = killed(out, takes, draw)
        same = {key: found[key] == whole[key] for key in whole}
        rows.append({"kills": struck, **same})
        kills += struck
        print(f"{kills} kills, {len(rows)} runs: {same}", flush=True)
        shutil.rmtree(out)
    odd = sum(not all((r["weights"], r["losses"], r["certificate"])) for r in rows)
    print(f"{kills} kills in {len(rows)} runs, {odd} of which came out otherwise")
    head = about(torch.device("cpu")) | {"steps": STEPS, "every": EVERY, "unbroken_s": takes}
    write_json(options.out, {"about": head, "kills": kills, "otherwise": odd, "rows": rows})


if __name__ == "__main__":
    main()
