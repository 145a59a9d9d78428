"""DeepSpeed's ZeRO trains, in two real processes by gloo: held as in one process without it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.models import batch, build, subspaces, trainable, with_lora
from tests.test_processes import together
from tests.zero import GROWTH, SPLIT, Run, alone, distance, measured, quietly, train, wholes

pytest.importorskip("deepspeed")

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
IN_FP32 = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
RUNS = {
    "ZeRO-1": Run(1, accumulate=2),
    "ZeRO-2": Run(2, groups=2),
    "ZeRO-2 offloaded": Run(2, OFFLOAD, accumulate=2),
    "ZeRO-3": Run(3, SPLIT, accumulate=2),
    "ZeRO-3 with small weights whole": Run(3, by="both"),
    "ZeRO-3 offloaded, in parts": Run(3, {**SPLIT, **OFFLOAD, "sub_group_size": 700}),
    "ZeRO-1 on all weights": Run(1, full=True),
    "ZeRO-3 on all weights": Run(3, SPLIT, full=True),
    "ZeRO-3 on given subspaces": Run(3, SPLIT, by="subspaces"),
    "ZeRO-3 on an adapter that goes on": Run(3, SPLIT, goes_on=True),
    "stage 0": Run(0, by="subspaces"),
}
ROUNDED = {
    "ZeRO-1 in bf16": Run(1, about=IN_FP32),
    "ZeRO-2 in bf16": Run(2, about=BF16),
    "ZeRO-3 in bf16": Run(3, SPLIT, about=BF16),
}
OTHERS = {
    "clipped": Run(2, about={"gradient_clipping": 0.5}),
    "Conv1D": Run(3, SPLIT, full=True, family="gpt2"),
}


def _runs(rank: int, folder: Path) -> dict:
    free = train(RUNS["ZeRO-3"], guarded=False)
    return {name: train(run) for name, run in {**RUNS, **ROUNDED, **OTHERS}.items()} | {"": free}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return together(_runs, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_held_and_as_in_one_process(runs, name):
    first, second = (found[name] for found in runs)
    U, V = measured(first["bases"], first["start"], first["saved"])
    assert max(U, V) <= 1e-6
    assert all(torch.equal(w, second["saved"][n]) for n, w in first["saved"].items())
    assert all(torch.equal(b, second["bases"][n]) for n, b in first["bases"].items())
    assert distance(first["weights"], alone(RUNS[name])) <= 1e-4
    certificate = first["certificate"]
    assert certificate["holds"] and certificate["through"] == pytest.approx(max(U, V), rel=1e-2)
    assert max(m["blocked"] for m in certificate["modules"].values()) > 0.1
    if name != "stage 0":
        assert certificate == second["certificate"]


def test_nothing_is_held_without_a_guard(runs):
    first, free = runs[0]["ZeRO-3"], runs[0][""]
    U, V = measured(first["bases"], free["start"], free["saved"])
    assert min(U, V) > 0.1
    assert distance(free["weights"], alone(RUNS["ZeRO-3"], guarded=False)) <= 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bf16_the_masters_are_exact(runs, name):
    first = runs[0][name]
    start = {n: w.to(torch.bfloat16) for n, w in first["start"].items()}
    assert max(measured(first["bases"], first["start"], first["weights"])) <= 1e-6
    floor = torch.finfo(torch.bfloat16).eps / 2
    assert max(measured(first["bases"], start, first["saved"])) <= floor
    assert first["certificate"]["holds"]
    assert {m["bound"] for m in first["certificate"]["modules"].values()} == {floor}


def test_clipping_comes_before_the_projection(runs):
    """So the norm that DeepSpeed clips by holds what is blocked, unlike that of a bare loop."""
    first = runs[0]["clipped"]
    assert max(measured(first["bases"], first["start"], first["saved"])) <= 1e-6
    assert 1e-4 < distance(first["weights"], alone(OTHERS["clipped"])) < 0.1


def test_weights_that_are_stored_transposed(runs):
    first = runs[0]["Conv1D"]
    U, V = measured(first["bases"], first["start"], first["saved"], transposed=True)
    assert max(U, V) <= 1e-6


def test_energies_are_those_of_one_process(runs):
    """What was blocked, added up over processes and fragments."""
    run = RUNS["ZeRO-3 on given subspaces"]
    model = run.model()
    optimizer = run.optimizer(model)
    with run.guard(model, optimizer) as guard:
        for step in range(run.steps):
            model(**batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = guard.leak()
    found = runs[0]["ZeRO-3 on given subspaces"]["certificate"]["modules"]
    for name, leak in expected.items():
        assert found[name]["blocked"] == pytest.approx(leak["blocked"], rel=1e-4)


CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def _config(stage: int) -> dict:
    zero = {"stage": stage, **SPLIT, "stage3_gather_16bit_weights_on_model_save": True}
    return {**CONFIG, "zero_optimization": zero}


def _trainer(out: Path, stage: int, callbacks=()):
    from transformers import Trainer

    from grasp import GraspCallback
    from tests.test_trainer import ROWS, arguments

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    options |= {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    return Trainer(
        model=with_lora(build()),
        args=arguments(out, deepspeed=_config(stage), per_device_train_batch_size=2, **options),
        train_dataset=ROWS,
        callbacks=[GraspCallback(**GROWTH), *callbacks],
    )


def _resumed(out: Path, stage: int, checkpoint: str | bool) -> dict:
    from accelerate.state import AcceleratorState

    trainer = _trainer(out, stage)
    trainer.train(resume_from_checkpoint=checkpoint)
    AcceleratorState._reset_state()
    return wholes(trainer.model, masters=False)


def _trains(rank: int, folder: Path) -> dict:
    from accelerate.state import AcceleratorState

    quietly()
    found = {"accelerate": _accelerated(1)}
    AcceleratorState._reset_state(True)
    for stage in (2, 3):
        out = folder / f"stage{stage}"
        first = _trainer(out, stage)
        start = wholes(first.model, masters=False)
        first.train()
        AcceleratorState._reset_state()
        found[stage] = {
            "start": start,
            "weights": wholes(first.model, masters=False),
            "bases": dict(first.callback_handler.callbacks[0].guard.bases),
            "logs": [log for log in first.state.log_history if "grasp/through" in log],
        }
    found[2]["again"] = _resumed(folder / "stage2", 2, str(folder / "stage2" / "checkpoint-2"))
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return found | {"bare": _saved_bare(folder)}


def _rows() -> slice:
    first = 2 * torch.distributed.get_rank()
    return slice(first, first + 2)


def _accelerated(stage: int) -> dict:
    from accelerate import Accelerator, DeepSpeedPlugin

    from grasp import Guard

    run = Run(stage)
    plugin = DeepSpeedPlugin(hf_ds_config=run.config())
    accelerator = Accelerator(deepspeed_plugin=plugin, cpu=True)
    model = run.model()
    engine, optimizer = accelerator.prepare(model, run.optimizer(model))
    begun, rows = wholes(model), _rows()
    with Guard(model, optimizer=optimizer, **GROWTH) as guard:  # as where a loop unwraps it
        for step in range(run.steps):
            loss = engine(**{k: v[rows] for k, v in batch(seed=step).items()}).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        bases = dict(guard.bases)
    return {"start": begun, "weights": wholes(model), "bases": bases}


def _saved_bare(folder: Path) -> dict:
    """Trained on from what another engine saved, without the file of inputs' bases."""
    run, found = Run(3, SPLIT), {}
    deepspeed = quietly()
    for name in ("whole", "again"):
        model = run.model()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=run.optimizer(model), config=run.config()
        )
        guard = run.guard(engine)
        if name == "again":
            engine.load_checkpoint(str(folder / "bare"), tag="three")
            guard.attach(folder / "guard.safetensors")
        else:
            guard.attach()
        for step in range(0 if name == "whole" else 3, run.steps):
            if step == 3 and name == "whole":
                engine.save_checkpoint(str(folder / "bare"), tag="three")
                guard.save(folder / "guard.safetensors")
                if torch.distributed.get_rank() == 0:
                    (folder / "guard_inputs.safetensors").unlink()
                torch.distributed.barrier()
            loss = engine(**{k: v[_rows()] for k, v in batch(seed=step).items()}).loss
            engine.backward(loss)
            engine.step()
        guard.detach()
        found[name] = wholes(model)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return folder, together(_trains, folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_line_in_a_trainer(trained, stage):
    folder, (first, second) = trained
    found = first[stage]
    assert max(measured(found["bases"], found["start"], found["weights"])) <= 1e-6
    assert all(torch.equal(w, second[stage]["weights"][n]) for n, w in found["weights"].items())
    certificate = json.loads((folder / f"stage{stage}" / "grasp.json").read_text())
    assert certificate["holds"] and certificate["through"] <= 1e-6
    assert certificate["divergence"] > 0
    assert found["logs"] and all(log["grasp/through"] <= 1e-6 for log in found["logs"])


def test_a_checkpoint_of_a_trainer_goes_on_bit_for_bit(trained):
    found = trained[1][0][2]
    assert all(torch.equal(w, found["again"][n]) for n, w in found["weights"].items())


def test_a_checkpoint_of_an_engine_goes_on(trained):
    """Bases of inputs that are not saved are found again with the weights as they were."""
    found = trained[1][0]["bare"]
    assert distance(found["again"], found["whole"]) <= 1e-6


def test_under_accelerate(trained):
    first, second = (found["accelerate"] for found in trained[1])
    assert max(measured(first["bases"], first["start"], first["weights"])) <= 1e-6
    assert all(torch.equal(w, second["weights"][n]) for n, w in first["weights"].items())
    assert distance(first["weights"], alone(Run(1))) <= 1e-4


def _killed(rank: int, folder: Path) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    quietly()
    _trainer(folder / "stage3", 3, [Kill()]).train()


def _after(rank: int, folder: Path) -> dict:
    quietly()
    found = {"resumed": _resumed(folder / "stage3", 3, True)}
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return found | {"refused": {name: _attached(name, run) for name, run in REFUSED.items()}}


PLUS = "ZeRO\\+\\+ .* plain ZeRO"
REFUSED = {  # of each what DeepSpeed is told to do
    "secondary partitions": Run(3, {"zero_hpz_partition_size": 2}),
    "quantised gradients": Run(3, {"zero_quantized_gradients": True}),
    "quantised weights": Run(3, {"zero_quantized_weights": True}),
    "NVMe": Run(3, {"offload_optimizer": {"device": "nvme", "nvme_path": "."}}),
    "weights in bf16": Run(2, about=BF16, full=True),
    "stage 0 in bf16": Run(0, about=BF16),
    "DeepCompile": Run(2, about={"compile": {"deepcompile": True}}),
    "round robin": Run(2, {"round_robin_gradients": True}),
    "1-bit Adam": Run(0, about={"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}),
    "swapped": Run(3),
    "split otherwise": Run(2),
    "no engine": Run(2),
    "too early": Run(2),
    "pipeline": Run(0),  # after which this process is one of a pipeline
}
WORDS = {
    "secondary partitions": PLUS,
    "quantised gradients": PLUS,
    "quantised weights": "not been implemented on CPU|ZeRO\\+\\+",  # DeepSpeed's own words
    "NVMe": "async_io",
    "weights in bf16": "trained itself in bfloat16.*torch_autocast.*or train a LoRA",
    "stage 0 in bf16": "FP16_UnfusedOptimizer .* plain ZeRO",
    "DeepCompile": "DeepCompile .* plain ZeRO",
    "round robin": "round_robin_gradients does that",
    "1-bit Adam": "OneBitAdam is not a supported DeepSpeed Optimizer",
    "swapped": "NVMe.*offload to the CPU",
    "split otherwise": "splits the model itself .* plain ZeRO",
    "pipeline": "pipeline engine .* plain ZeRO",
    "no engine": "give what deepspeed.initialize",
    "too early": "attach it after deepspeed.initialize",
}


def _attached(name: str, run: Run) -> str:
    """What is said where a run can't be guarded."""
    from grasp import Guard

    deepspeed = quietly()
    model = run.model()
    if name == "pipeline":
        layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
        model = deepspeed.pipe.PipelineModule(layers, num_stages=2)
    optimizer = None if name == "1-bit Adam" else run.optimizer(model)
    options = {"optimizer": optimizer, "model_parameters": trainable(model), "config": run.config()}
    early = Guard(model, subspaces(), optimizer=optimizer)
    try:
        if name == "too early":
            early.attach()
        engine, *_ = deepspeed.initialize(model=model, **options)
        if name == "swapped":  # as it is where DeepSpeed is built for it
            engine.optimizer.swap_optimizer = True
        if name == "split otherwise":
            own = [torch.distributed.new_group([rank]) for rank in (0, 1)]
            engine.optimizer.dp_process_group = own[torch.distributed.get_rank()]
        if name == "too early":
            engine.backward(engine(**batch(rows=2)).loss)
        elif name == "no engine":
            Guard(model, subspaces()).attach()
        else:
            Guard(engine, subspaces()).attach()
    except (AssertionError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    finally:
        early.detach()
    return "nothing"


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        together(_killed, folder)
    return together(_after, folder)


def test_a_killed_run_goes_on_bit_for_bit(trained, after):
    uncut = trained[1][0][3]["weights"]
    for found in after:
        assert all(torch.equal(w, found["resumed"][n]) for n, w in uncut.items())


@pytest.mark.parametrize("name", WORDS)
def test_what_cannot_be_guarded_is_refused(after, name):
    for found in after:
        assert re.search(WORDS[name], found["refused"][name]), found["refused"][name]
