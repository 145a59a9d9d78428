"""DeepSpeed's ZeRO trains, in two real processes by gloo: held as in one process without it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.models import batch, build, subspaces, trainable, with_lora
from tests.sharded_runs import distance, through
from tests.together import together
from tests.zero import GROWTH, SPLIT, Run, alone, own, quietly, train, wholes

pytest.importorskip("deepspeed")

LIMIT = 1e-6
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
IN_FP32 = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
PARTS = {**SPLIT, **OFFLOAD, "sub_group_size": 700}
RUNS = {
    "ZeRO-1": Run(1, accumulate=2),
    "ZeRO-2": Run(2, groups=2),
    "ZeRO-2 offloaded": Run(2, OFFLOAD, accumulate=2),
    "ZeRO-3": Run(3, SPLIT, by="both"),
    "ZeRO-3 with small weights whole": Run(3, accumulate=2),
    "ZeRO-3 offloaded, in parts, an adapter goes on": Run(3, PARTS, goes_on=True, rate=3e-2),
    "ZeRO-2, few free": Run(2, free=6, groups=2),
    "ZeRO-3, few free": Run(3, SPLIT, free=6),
    "ZeRO-1 on all weights": Run(1, full=True),
    "ZeRO-3 on all weights": Run(3, SPLIT, full=True),
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


def _both(rank: int, folder: Path) -> dict:
    """What each of two processes found; the last refusal makes it one of a pipeline."""
    kept = folder / "kept"
    found = {
        "free": train(RUNS["ZeRO-2"], guarded=False),
        "ZeRO-3": train(RUNS["ZeRO-3"], keep=kept),
        "again": train(RUNS["ZeRO-3"], resume=kept),
    }
    runs = {**RUNS, **ROUNDED, **OTHERS}
    found |= {name: train(run) for name, run in runs.items() if name not in found}
    found |= _by_trainers(folder)
    return found | {"refused": {name: _attached(name, run) for name, run in REFUSED.items()}}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return folder, together(_both, folder)


@pytest.fixture(scope="module")
def runs(both):
    return both[1]


@pytest.mark.parametrize("name", RUNS)
def test_held_and_as_in_one_process(runs, name):
    first, second = (found[name] for found in runs)
    outputs, inputs = through(first)
    assert max(outputs, inputs) <= LIMIT
    assert all(torch.equal(w, second["after"][n]) for n, w in first["after"].items())
    assert all(torch.equal(b, second["bases"][n]) for n, b in first["bases"].items())
    without = alone(RUNS[name])
    assert distance(without, first) <= 1e-4
    certificate = first["certificate"]
    assert certificate["holds"]
    assert certificate["through"] == pytest.approx(max(outputs, inputs), rel=1e-2)
    assert max(m["blocked"] for m in certificate["modules"].values()) > 0.1
    if name == "stage 0":  # which averages what each process has projected, and counted
        return
    assert certificate == second["certificate"]
    if RUNS[name].accumulate == 1:  # one process alone projects, and counts, each micro-batch
        for n, leak in without["leak"].items():
            blocked = certificate["modules"][n]["blocked"]
            assert blocked == pytest.approx(leak["blocked"], rel=1e-3, abs=1e-5)


def test_nothing_is_held_without_a_guard(runs):
    first, free = runs[0]["ZeRO-2"], runs[0]["free"]
    assert min(through(free | {"bases": first["bases"]})) > 0.1
    assert distance(alone(RUNS["ZeRO-2"], guarded=False), free) <= 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bf16_the_masters_are_exact(runs, name):
    first = runs[0][name]
    floor = torch.finfo(torch.bfloat16).eps / 2
    assert max(through(first)) <= floor
    assert max(through(first | first["masters"])) <= LIMIT
    assert first["certificate"]["holds"]
    assert {m["bound"] for m in first["certificate"]["modules"].values()} == {floor}


def test_clipping_comes_before_the_projection(runs):
    """So the norm that DeepSpeed clips by holds what is blocked, unlike that of a bare loop."""
    first = runs[0]["clipped"]
    assert max(through(first)) <= LIMIT
    assert 1e-3 < distance(alone(OTHERS["clipped"]), first) < 0.5


def test_weights_that_are_stored_transposed(runs):
    assert max(through(runs[0]["Conv1D"])) <= LIMIT


def test_a_checkpoint_of_an_engine_goes_on(runs):
    """Bases of inputs that are not saved are found again with the weights as they were."""
    for found in runs:
        assert distance(found["ZeRO-3"], found["again"]) <= 1e-5


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


def _by_trainers(folder: Path) -> dict:
    from accelerate.state import AcceleratorState

    found: dict = {"accelerate": _accelerated(Run(1))}
    AcceleratorState._reset_state(True)
    for stage in (2, 3):
        out = folder / f"stage{stage}"
        first = _trainer(out, stage)
        before = wholes(first.model, masters=False)
        first.train()
        AcceleratorState._reset_state()
        found[stage] = {
            "before": before,
            "after": wholes(first.model, masters=False),
            "bases": dict(first.callback_handler.callbacks[0].guard.bases),
            "transposed": False,
            "logs": [log for log in first.state.log_history if "grasp/through" in log],
        }
    found["from step 2"] = _resumed(folder / "stage2", 2, str(folder / "stage2" / "checkpoint-2"))
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return found


def _accelerated(run: Run) -> dict:
    from accelerate import Accelerator, DeepSpeedPlugin

    from grasp import Guard

    plugin = DeepSpeedPlugin(hf_ds_config=run.config())
    accelerator = Accelerator(deepspeed_plugin=plugin, cpu=True)
    model = run.model()
    engine, optimizer = accelerator.prepare(model, run.optimizer(model))
    found = {"before": wholes(model), "transposed": False}
    with Guard(model, optimizer=optimizer, **GROWTH) as guard:  # as where a loop unwraps it
        for step in range(run.steps):
            accelerator.backward(engine(**own(batch(seed=step))).loss)
            optimizer.step()
            optimizer.zero_grad()
        found["bases"] = dict(guard.bases)
    return found | {"after": wholes(model)}


@pytest.mark.parametrize("stage", [2, 3])
def test_one_line_in_a_trainer(both, stage):
    folder, (first, second) = both
    found = first[stage]
    assert max(through(found)) <= LIMIT
    assert all(torch.equal(w, second[stage]["after"][n]) for n, w in found["after"].items())
    certificate = json.loads((folder / f"stage{stage}" / "grasp.json").read_text())
    assert certificate["holds"] and certificate["through"] <= LIMIT
    assert certificate["divergence"] > 0
    assert found["logs"] and all(log["grasp/through"] <= LIMIT for log in found["logs"])


def test_a_checkpoint_of_a_trainer_goes_on_bit_for_bit(runs):
    for found in runs:
        assert all(torch.equal(w, found["from step 2"][n]) for n, w in found[2]["after"].items())


def test_under_accelerate(runs):
    first, second = (found["accelerate"] for found in runs)
    assert max(through(first)) <= LIMIT
    assert all(torch.equal(w, second["after"][n]) for n, w in first["after"].items())
    assert distance(alone(Run(1)), first) <= 1e-4


def _killed(rank: int, folder: Path) -> None:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    quietly()
    _trainer(folder / "stage3", 3, [Kill()]).train()


def _goes_on(rank: int, folder: Path) -> dict:
    quietly()
    return _resumed(folder / "stage3", 3, True)


def test_a_killed_run_goes_on_bit_for_bit(runs, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        together(_killed, tmp_path)
    uncut = runs[0][3]["after"]
    for resumed in together(_goes_on, tmp_path):
        assert all(torch.equal(w, resumed[n]) for n, w in uncut.items())


PLUS = "ZeRO\\+\\+ .* plain ZeRO"
REFUSED = {  # of each what DeepSpeed is told to do
    "secondary partitions": Run(3, {"zero_hpz_partition_size": 2}),
    "quantised gradients": Run(3, {"zero_quantized_gradients": True}),
    "quantised weights": Run(3, {"zero_quantized_weights": True}),
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
        if name == "swapped":  # as offloading to NVMe says, which compiles
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


@pytest.mark.parametrize("name", WORDS)
def test_what_cannot_be_guarded_is_refused(runs, name):
    for found in runs:
        assert re.search(WORDS[name], found["refused"][name]), found["refused"][name]
