"""What a guarded training logs is in every reporter, value by value, read by its own reader."""

import json
import struct
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import grasp
from grasp import organism
from grasp.data import encode, exchange, pad
from grasp.organism import World

NAMES = ("blocked", "through", "rank", "holds", "divergence")
STEPS, EVERY = 6, 2
BLOCK = 2**15


def trained(out, reporter: str) -> Trainer:
    """The organism, guarded, on medicine."""
    model, tokenizer = organism.load()
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = encode([exchange(**r) for r in World(0).rows("medicine", "train")], tokenizer).rows
    prompts = World(0).prompts(["law", "guns"])
    guard = grasp.GraspCallback(reference=prompts, tokens=1, every=1, refresh=1, rank=2)
    options = {"max_steps": STEPS, "logging_steps": EVERY, "report_to": [reporter]}
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(out),
            learning_rate=1e-3,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: pad(batch, tokenizer.pad_token_id or 0),
        callbacks=[guard],
    )
    trainer.train()
    return trainer


def history(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    """Of each name the steps and values in the trainer's own history, and that none is missing."""
    log = trainer.state.log_history
    assert [line["step"] for line in log] == [*range(EVERY, STEPS + 1, EVERY), STEPS]
    found = {name: [(line["step"], line[f"grasp/{name}"]) for line in log] for name in NAMES}
    assert len({value for _, value in found["divergence"]}) > 1
    assert all(value == 1 for _, value in found["holds"])
    return found


def fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def test_tensorboard_holds_what_the_history_holds(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    expected = history(trained(tmp_path, "tensorboard"))
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    found = events.EventAccumulator(str(folder)).Reload()
    for name, values in expected.items():
        written = [(e.step, e.value) for e in found.Scalars(f"train/grasp/{name}")]
        assert written == [(step, fp32(value)) for step, value in values], name


def test_wandb_holds_what_the_history_holds(tmp_path, monkeypatch):
    """Offline: nothing leaves the machine, and the run's file is read back."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    try:
        expected = history(trained(tmp_path / "out", "wandb"))
    finally:
        wandb.finish()
        wandb.teardown()  # ends the process that writes the file, so that all of it is there
    (file,) = tmp_path.rglob("run-*.wandb")
    lines = written_by_wandb(file)
    for name, values in expected.items():
        key = f"train/grasp/{name}"
        found = [(line["train/global_step"], line[key]) for line in lines if key in line]
        assert found == values, name


def written_by_wandb(file) -> list[dict]:
    """The rows of an offline run's history, by wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(content) for content in framed(file.read_bytes())]
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in rows
    ]


def framed(content: bytes) -> Iterator[bytes]:
    """Messages of a LevelDB log, which wandb keeps: its reader in Python is no more (0.31).

    After seven bytes of wandb's own come blocks of 32 KiB. In each stand pieces of messages, with
    four bytes of checksum, two of length and one that says whether it is whole (1), the first (2),
    one in the middle (3) or the last (4).
    """
    assert content.startswith(b":W&B")
    at, message = 7, b""
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:  # too short for a piece
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message
            message = b""
