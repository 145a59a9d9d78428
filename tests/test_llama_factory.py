"""LLaMA-Factory's entry, `run_exp`, as released; `make doors` installs it with its own pins."""

import json

import pytest

pytest.importorskip("llamafactory", reason="make doors installs it")

import grasp  # noqa: E402
from tests.test_examples import FOLDER, example, kept, saved_model  # noqa: E402

STAGES = {
    "sft": {},
    "pt": {"stage": "pt"},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "orpo": {"stage": "dpo", "pref_loss": "orpo", "dataset": "pairs"},
    "rsLoRA": {"use_rslora": True},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the example with other keys, and give the guard that held it."""
    from trl import import_utils

    for name, found in list(vars(import_utils).items()):
        if isinstance(found, tuple):  # TRL 0.24 takes (False, "N/A") of transformers 5 for a yes
            monkeypatch.setattr(import_utils, name, found[0])
    seen = []
    begins = grasp.GraspCallback.on_train_begin

    def begun(self, *args, **kwargs):
        begins(self, *args, **kwargs)
        seen.append(self.guard)

    monkeypatch.setattr(grasp.GraspCallback, "on_train_begin", begun)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is rain?\nWho was first?\n")
    keys = {
        "model_name_or_path": str(saved_model(tmp_path / "model")),
        "dataset_dir": str(FOLDER / "llama_factory"),
        "output_dir": str(tmp_path / "out"),
        "template": "empty",
        "max_steps": 3,
        "cutoff_len": 256,
        "use_cpu": True,
    }
    arguments = [str(FOLDER / "llama_factory" / "lora.yaml"), "--prompts", str(prompts)]

    def runs(**changed):
        example("llama_factory/train").main(arguments, **(keys | changed))
        return seen[-1]

    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_what_it_trains_is_kept_off(run, tmp_path, stage):
    guard = run(**STAGES[stage])
    assert json.loads((tmp_path / "out" / "grasp.json").read_text())["holds"]
    assert kept(guard, tmp_path / "out") <= 1e-6


def test_a_reward_model_is_refused_by_name(run):
    with pytest.raises(ValueError, match="give subspaces"):
        run(stage="rm", dataset="pairs")


def test_dora_is_refused_by_name(run):
    with pytest.raises(ValueError, match="DoRA"):
        run(use_dora=True)
