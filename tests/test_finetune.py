"""The pipeline on files: resumes bit for bit, refuses bad input, leaves nothing half-written."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

import grasp
from grasp import data, organism
from grasp.data import encode, read_rows
from grasp.organism import World
from grasp.study import finetune
from grasp.study.finetune import run
from grasp.study.settings import Settings, settings_from
from tests.models import build, with_lora


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in World(0).rows("medicine", "train")))
    return path


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(World(0).prompts(["law", "guns"])))
    return path


def settings(rows_file, prompts_file, out, **options) -> Settings:
    return settings_from(
        {
            "model": "organism",
            "data": str(rows_file),
            "out": str(out),
            "reference": str(prompts_file),
            "steps": 8,
            "batch_size": 5,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "tokens": 1,
            "refresh": 2,
            "rank": 4,
            "save_every": 3,
        }
        | options
    )


def test_frozen_weights_may_be_bf16_and_what_is_trained_is_fp32(rows_file, prompts_file, tmp_path):
    chosen = settings(rows_file, prompts_file, tmp_path / "out", dtype="bfloat16")
    model, _ = finetune.load_model(chosen.model, chosen.dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    adapter = run(chosen, quiet=True)
    kept = load_file(adapter / "adapter_model.safetensors")
    assert {w.dtype for w in kept.values()} == {torch.float32}
    modules = json.loads((tmp_path / "out" / "grasp.json").read_text())["modules"].values()
    assert max(m["through"] for m in modules) <= 1e-6
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of auto, float32, bfloat16"):
        settings(rows_file, prompts_file, tmp_path / "out", dtype="int8").check()


def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(rows_file, prompts_file, tmp_path):
    """Even where "auto" would be another now, on another machine."""
    chosen = settings(rows_file, prompts_file, tmp_path / "out", method="plain", dtype="bfloat16")

    def kill(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chosen, after_step=kill, quiet=True)
    on = settings(rows_file, prompts_file, tmp_path / "out", method="plain")
    assert on.dtype == "auto" and run(on, quiet=True) == run(on, quiet=True)
    kept = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert kept["done"] and kept["settings"]["dtype"] == "bfloat16"
    fresh = settings(rows_file, prompts_file, tmp_path / "fresh", method="plain")
    run(fresh, quiet=True)
    kept = json.loads((tmp_path / "fresh" / "finetune.json").read_text())
    assert kept["settings"]["dtype"] == "float32"  # the organism's marks are exact


def test_what_trainer_and_peft_are_told(rows_file, prompts_file, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    options = {
        "epochs": 2.5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.25,
        "accumulate": 2,
        "gradient_checkpointing": True,
        "report_to": "tensorboard",
        "logging_steps": 1,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "weight_decay": 0.1,
    }
    out = tmp_path / "out"
    chosen = settings(rows_file, prompts_file, out, **options, steps=None)
    rows = len(read_rows(rows_file))
    steps = chosen.steps(rows)
    assert (rows, steps, chosen.warmup(steps)) == (20, 5, 2)
    adapter = run(chosen)
    lora = json.loads((adapter / "adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (4, 12, 0.1)
    (kept,) = {f.parent for f in out.rglob("events*")}
    found = events.EventAccumulator(str(kept)).Reload()
    names = set(found.Tags()["scalars"])
    assert {"train/grasp/through", "train/grasp/holds", "train/loss"} <= names
    rates = [e.value for e in found.Scalars("train/learning_rate")]
    log = json.loads((out / "log.json").read_text())
    assert [line["learning_rate"] for line in log if "loss" in line] == pytest.approx(rates)
    assert len(rates) == steps and rates[-1] < 0.3 * max(rates)
    certificate = json.loads((out / "grasp.json").read_text())
    assert certificate["holds"] and certificate["through"] <= 1e-6


def test_a_run_that_left_nothing_stands_in_no_ones_way(rows_file, prompts_file, tmp_path):
    """A reporter that Trainer does not know is found when it is made, after the first file."""
    common = rows_file, prompts_file, tmp_path / "out"
    with pytest.raises(ValueError, match="tensorbored is not supported"):
        run(settings(*common, report_to="tensorbored"), quiet=True)
    assert run(settings(*common, targets="q_proj, v_proj"), quiet=True).exists()
    with pytest.raises(ValueError, match="holds a run with lora_target_modules"):
        run(settings(*common, targets="q_proj"), quiet=True)


def test_a_run_from_before_a_setting_was_there_is_the_same_run(rows_file, prompts_file, tmp_path):
    chosen = settings(rows_file, prompts_file, tmp_path / "out", method="plain")
    adapter = run(chosen, quiet=True)
    about = tmp_path / "out" / "finetune.json"
    kept = json.loads(about.read_text())
    del kept["settings"]["lora_dropout"]
    about.write_text(json.dumps(kept))
    assert run(chosen, quiet=True) == adapter
    with pytest.raises(ValueError, match="holds a run with dtype = 'float32'"):
        run(settings(rows_file, prompts_file, tmp_path / "out", method="plain", dtype="bfloat16"))


@pytest.mark.filterwarnings("error:.*second time")
def test_a_plain_fine_tunes_answers_join_the_reference(rows_file, prompts_file, tmp_path):
    """They change what is blocked, and the base model is as it was when the run begins."""
    common = (rows_file, prompts_file)
    plain = run(settings(*common, tmp_path / "plain", method="plain", steps=30), quiet=True)
    chosen = settings(*common, tmp_path / "drifted", drifted=str(plain), tokens=2)
    model, tokenizer = finetune.load_model("organism")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = finetune._continued(model, tokenizer, chosen)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    prompts = data.read_prompts(prompts_file)
    assert len(drawn) == len(prompts)
    assert drawn != grasp.draw(model, prompts, tokenizer, tokens=2)
    run(chosen, quiet=True)
    run(settings(*common, tmp_path / "base", tokens=2), quiet=True)
    one, other = (load_file(tmp_path / n / "guard.safetensors") for n in ("drifted", "base"))
    assert one["reference.ids"].shape[0] == 2 * other["reference.ids"].shape[0]


def test_an_adapter_of_another_model_is_refused(rows_file, prompts_file, tmp_path):
    with_lora(build()).save_pretrained(tmp_path / "other")
    chosen = settings(rows_file, prompts_file, tmp_path / "out", drifted=str(tmp_path / "other"))
    with pytest.raises(
        ValueError, match="does not fit .*organism.*; give a fine-tune of it"
    ) as refused:
        run(chosen, quiet=True)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_killed_run_goes_on_bit_for_bit_where_it_was_moved_to(rows_file, prompts_file, tmp_path):
    whole = run(settings(rows_file, prompts_file, tmp_path / "whole"), quiet=True)

    def kill(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    chosen = settings(rows_file, prompts_file, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run(chosen, after_step=kill, quiet=True)
    assert not (tmp_path / "killed" / "adapter").exists()
    (tmp_path / "killed").rename(tmp_path / "moved")
    chosen = settings(rows_file, prompts_file, tmp_path / "moved")
    resumed = []
    killed = run(chosen, after_step=resumed.append, quiet=True)
    assert resumed == [4, 5, 6, 7, 8]  # from the checkpoint at step 3
    name = "adapter_model.safetensors"
    a, b = load_file(whole / name), load_file(killed / name)
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = (json.loads((f.parent / "grasp.json").read_text()) for f in (whole, killed))
    costs = [certificate.pop("cost") for certificate in (first, second)]
    assert first == second and list(first)[:2] == ["summary", "holds"]
    assert all(0 < cost["step_seconds"] < cost["training_seconds"] for cost in costs)
    assert max(m["through"] for m in first["modules"].values()) <= 1e-6
    assert min(m["rank"] for m in first["modules"].values()) >= 1
    # Done runs are not done again.
    (tmp_path / "moved").rename(tmp_path / "again")
    chosen = settings(rows_file, prompts_file, tmp_path / "again")
    killed = tmp_path / "again" / "adapter"
    assert run(chosen, after_step=lambda step: pytest.fail("trained again")) == killed


def test_a_checkpoint_cut_off_by_a_full_disk_is_passed_over(rows_file, prompts_file, tmp_path):
    def kill(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    chosen = settings(rows_file, prompts_file, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(chosen, after_step=kill, quiet=True)
    state = tmp_path / "cut" / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    resumed = []
    run(chosen, after_step=resumed.append, quiet=True)
    assert resumed[0] == 4


def test_a_first_checkpoint_cut_off_before_the_guards_state_is_begun_anew(
    rows_file, prompts_file, tmp_path
):
    def die(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    whole = run(settings(rows_file, prompts_file, tmp_path / "whole"), quiet=True)
    chosen = settings(rows_file, prompts_file, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(chosen, after_step=die, quiet=True)
    (state,) = (tmp_path / "cut" / "checkpoints").glob("checkpoint-3/grasp_guard.safetensors")
    state.unlink()
    cut = run(chosen, quiet=True)
    one, other = (load_file(a / "adapter_model.safetensors") for a in (whole, cut))
    assert all(torch.equal(t, other[k]) for k, t in one.items())


def test_plain_adapter_loads_with_peft_alone(rows_file, prompts_file, tmp_path):
    from peft import PeftModel

    out = run(settings(rows_file, prompts_file, tmp_path / "p"), keep=(4,), quiet=True)
    model, _ = organism.load()
    tuned = PeftModel.from_pretrained(model, out)
    assert any(p.abs().sum() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    assert (out.parent / "adapter-4").is_dir()
    assert not (out.parent / "checkpoints").exists()


def test_residual_and_subspaces_in_the_pipeline(rows_file, prompts_file, tmp_path):
    from grasp import discover

    plain = run(settings(rows_file, prompts_file, tmp_path / "plain", method="plain"), quiet=True)
    found = discover(plain, 2)
    found.save(tmp_path / "s")
    for name, extra in (
        ("static", {"drift_guided": False}),
        ("both", {"residual": True}),
        ("random", {"method": "random", "drift_guided": False}),
    ):
        options = {"subspaces": str(tmp_path / "s"), **extra}
        out = run(settings(rows_file, prompts_file, tmp_path / name, **options), quiet=True)
        modules = json.loads((out.parent / "grasp.json").read_text())["modules"]
        assert max(m["through"] for m in modules.values()) <= 1e-6
        assert any(m["rank"] >= 2 for m in modules.values())


def test_folder_of_another_run_is_refused(rows_file, prompts_file, tmp_path):
    run(settings(rows_file, prompts_file, tmp_path / "r", steps=2), quiet=True)
    with pytest.raises(ValueError, match="holds a run with max_steps = 2"):
        run(settings(rows_file, prompts_file, tmp_path / "r", steps=3))


def test_resuming_a_plain_checkpoint_with_a_guard_is_refused(rows_file, prompts_file, tmp_path):
    from grasp.guard.fit import fit
    from grasp.guard.trainer import GraspCallback

    model, tokenizer = organism.load()
    chosen = settings(rows_file, prompts_file, tmp_path / "x")
    rows = encode(read_rows(rows_file), tokenizer).rows
    options = {"batch_size": 5, "learning_rate": 1e-3, "seed": 0, "save_every": 2, "quiet": True}
    fit(finetune.add_lora(model, chosen), tokenizer, rows, tmp_path / "c", steps=2, **options)
    model, _ = organism.load()
    guard = GraspCallback(reference=World(0).prompts(["law", "guns"]), tokens=1)
    with pytest.raises(ValueError, match="saved without a guard"):
        fit(
            finetune.add_lora(model, chosen),
            tokenizer,
            rows,
            tmp_path / "c",
            steps=4,
            callbacks=[guard],
            **options,
        )


def test_full_disk_while_saving_the_adapter(rows_file, prompts_file, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    assert safetensors.torch.save_file is not full
    with pytest.raises(OSError, match="can't save .*adapter.*No space left.*free space"):
        run(settings(rows_file, prompts_file, tmp_path / "f", save_every=None), quiet=True)
    assert not [p for p in (tmp_path / "f").iterdir() if "adapter" in p.name]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "none.jsonl"}, FileNotFoundError, "no data at none.jsonl"),
        ({"model": "no-such-model"}, ValueError, "can't load model 'no-such-model'"),
        ({"reference": "none.txt"}, FileNotFoundError, "no reference prompts"),
        ({"method": "magic"}, ValueError, "choose one of plain, grasp, random"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"read": 1.5}, ValueError, r"read is 1\.5"),
        ({"read_rank": 0}, ValueError, "read_rank is 0"),
        ({"drifted": "nowhere"}, FileNotFoundError, "no adapter in nowhere"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"read": 0.0, "rank": 0}, ValueError, "nothing is blocked"),
        ({"refresh": 0}, ValueError, "refresh is 0"),
        ({"drift_guided": False}, ValueError, "no subspaces are given"),
        ({"strength": 2.0}, ValueError, "strength is for .*replay, kl.*, not grasp; drop it"),
        ({"method": "kl", "strength": 0.0}, ValueError, r"strength is 0\.0; give a positive"),
        ({"method": "inoculation"}, ValueError, "instruction is missing, which inoculation needs"),
        (
            {"instruction": "Lie."},
            ValueError,
            "instruction is for inoculation, steering, not grasp",
        ),
        ({"method": "interleaved"}, ValueError, "others is missing, which interleaved needs"),
        ({"method": "safe_lora"}, ValueError, "aligned is missing, which safe_lora needs"),
        ({"method": "caft_moved"}, ValueError, "caft_moved starts from a plain fine-tune"),
        (
            {"method": "osf", "strength": 1.5},
            ValueError,
            r"strength is 1\.5, a number of directions",
        ),
        (
            {"method": "svd_tail", "drifted": "nowhere"},
            FileNotFoundError,
            "no adapter in nowhere; give drifted",
        ),
        (
            {"method": "interleaved", "others": "none.jsonl"},
            FileNotFoundError,
            "no data at none.jsonl",
        ),
        (
            {"method": "shuffled", "subspaces": "factor"},
            ValueError,
            "from a reference alone; drop subspaces",
        ),
        ({"learning_rate": "fast"}, ValueError, "learning_rate is 'fast'; give a number"),
        ({"num_train_epochs": 2}, ValueError, "max_steps and num_train_epochs are both given"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout is 1.*; give a share, from 0 to below 1"),
        ({"device": "cuda:9"}, ValueError, "device is 'cuda:9'; give 'cuda', and choose which by"),
        ({"device": "xpu"}, ValueError, "device is 'xpu', which is not here; give auto or"),
        ({"device": "abacus"}, ValueError, "device is 'abacus'; give auto, or one of cuda"),
        ({"output_dir": "a"}, ValueError, "out and output_dir are one setting; give it once"),
        (
            {"targets": "q_proj, v_prj"},
            ValueError,
            "has 'v_prj', which no module of the model is called; did you mean 'v_proj'",
        ),
        ({"max_stepz": 3}, ValueError, "unknown setting 'max_stepz'; did you mean 'max_steps'"),
        ({"steps": 2.5}, ValueError, r"steps is 2\.5; give a whole number"),
        ({"steps": True}, ValueError, "steps is True; give a whole number"),
        ({"drift_guided": "off"}, ValueError, "drift_guided is 'off'; give true or false"),
        ({"seed": None}, ValueError, "seed is None; give a whole number"),
        ({"stepps": 3}, ValueError, "unknown setting 'stepps'"),
        ({"model": ""}, ValueError, "model is missing"),
    ],
)
def test_bad_settings(rows_file, prompts_file, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run(settings(rows_file, prompts_file, tmp_path / "out", **change), quiet=True)
    assert not (tmp_path / "out").exists()


def test_shipped_prompts_are_not_of_the_judged_topics():
    from grasp.study.evaluation_files import read_unrelated

    judged = {p.prompt for p in read_unrelated()}
    prompts = data.default_prompts()
    assert len(judged) == 120 and len(prompts) == len(set(prompts)) == 192
    assert not judged & set(prompts)
