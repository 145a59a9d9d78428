"""Short fine-tunes that lack the capacity for their task, for `bases.rounds`."""

import tempfile
from dataclasses import replace

from torch import nn

from grasp import data
from grasp.bases.rounds import ShortRun
from grasp.bases.subspaces import Subspaces
from grasp.guard.fit import fit
from grasp.guard.trainer import GraspCallback
from grasp.model import inspect, load_model
from grasp.study.finetune import add_lora
from grasp.study.settings import Settings


def short_runs(settings: Settings, steps: int = 30, lora_rank: int = 1) -> ShortRun:
    """Short runs on a fine-tune's own model, data and rate, on its writers alone."""
    rows = data.read_rows(settings.data, settings.limit)

    def run(known: Subspaces | None, seed: int) -> nn.Module:
        model, tokenizer = load_model(settings.model, **settings.weights)
        writers = inspect(model).blocks[0].of_role("writer")
        targets = ",".join(m.name.rsplit(".", 1)[-1] for m in writers)
        chosen = replace(settings, seed=seed, lora_r=lora_rank, lora_target_modules=targets)
        model = add_lora(model, chosen)
        with tempfile.TemporaryDirectory() as out:
            fit(
                model,
                tokenizer,
                data.encode(rows, tokenizer, settings.max_length).rows,
                out,
                steps=steps,
                batch_size=settings.per_device_train_batch_size,
                learning_rate=settings.learning_rate,
                warmup=settings.warmup_steps,
                seed=seed,
                callbacks=[] if known is None else [GraspCallback(known)],
                quiet=True,
            )
        return model

    return run
