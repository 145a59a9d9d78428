"""Each trainer of TRL with the one line: what it trains is kept off, or refused by name."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import grasp
from grasp.guard.trainer import CERTIFICATE
from tests.models import GROUPED, subspaces, with_lora
from tests.test_guarantee import deltas, through
from tests.test_training import hooks

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT = (
    "{% for m in messages %}{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' }}{% endfor %}"
)
PROMPTS = ["2 + 2", "Hi!", "A poem", "Who?"]
ASKED = [f"Is {i} odd?" for i in range(8)]
ANSWERS = [" yes" if i % 2 else " no" for i in range(8)]
WRONG = ANSWERS[::-1]
DOCS = (Path(__file__).parent.parent / "docs" / "doors.md").read_text()


class Case(NamedTuple):
    """A trainer: the module that has it and its settings, its rows' form, what it asks for."""

    module: str
    rows: str
    settings: dict
    given: tuple[str, ...] = ()


SHORT = {"max_completion_length": 4}
GROUPS = {**SHORT, "num_generations": 2}
CASES = {
    "SFTTrainer": Case("trl", "completions", {}),
    "DPOTrainer": Case("trl", "preferences", {}),
    "KTOTrainer": Case("trl", "labels", {}),
    "RewardTrainer": Case("trl", "preferences", {}),
    "GRPOTrainer": Case("trl", "prompts", GROUPS, ("reward_funcs",)),
    "RLOOTrainer": Case("trl", "prompts", GROUPS, ("reward_funcs",)),
    "DistillationTrainer": Case("trl", "prompts", SHORT, ("teacher_model",)),
    "ORPOTrainer": Case("trl.experimental.orpo", "preferences", {}),
    "CPOTrainer": Case("trl.experimental.cpo", "preferences", {}),
    "TPOTrainer": Case("trl.experimental.tpo", "preferences", {}),
    "OnlineDPOTrainer": Case(
        "trl.experimental.online_dpo", "prompts", {"max_new_tokens": 4}, ("reward_funcs",)
    ),
    "GKDTrainer": Case(
        "trl.experimental.gkd", "messages", {"max_new_tokens": 4}, ("teacher_model",)
    ),
    "GOLDTrainer": Case("trl.experimental.gold", "messages", SHORT, ("teacher_model",)),
    "GMPOTrainer": Case("trl.experimental.gmpo", "prompts", GROUPS, ("reward_funcs",)),
    "SDFTTrainer": Case("trl.experimental.sdft", "contexts", GROUPS),
    "SDPOTrainer": Case("trl.experimental.sdpo", "prompts", GROUPS, ("reward_funcs",)),
    "A2POTrainer": Case(
        "trl.experimental.a2po.a2po_trainer",
        "prompts",
        {**SHORT, "num_value_samples": 2},
        ("reward_funcs",),
    ),
    "IWOPDTrainer": Case("trl.experimental.iw_opd", "messages", SHORT, ("teacher_model",)),
}
"""Those that ask for a server of their own (AsyncGRPO, AsyncDistillation, ServerDistillation) can't
run here."""


def tokenizer() -> t.PreTrainedTokenizerFast:
    """Bytes, as byte-level tokenizers have them before they merge any."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + letters)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return t.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **named)


def tiny(seed: int = 0, kind=t.LlamaForCausalLM, **options) -> t.PreTrainedModel:
    torch.manual_seed(seed)
    model = kind(t.LlamaConfig(**{**GROUPED, "vocab_size": 259, **options}))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model


def scoring() -> PeftModel:
    model = tiny(kind=t.LlamaForSequenceClassification, num_labels=1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS"))


def rows(form: str) -> Dataset:
    columns = {
        "completions": {"prompt": ASKED, "completion": ANSWERS},
        "preferences": {
            "prompt": ASKED,
            "chosen": ANSWERS,
            "rejected": WRONG,
            "reference": [" so"] * 8,
        },
        "labels": {"prompt": ASKED, "completion": ANSWERS, "label": [True, False] * 4},
        "prompts": {"prompt": ASKED},
        "contexts": {"prompt": ASKED, "privileged_context": ANSWERS},
        "messages": {
            "messages": [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for q, a in zip(ASKED, ANSWERS, strict=True)
            ]
        },
    }
    return Dataset.from_dict(columns[form])


def reward(completions, **kwargs) -> list[float]:
    return [float(sum(str(text).encode()) % 5) for text in completions]


def trainer(name: str, out: Path, callback):
    case = CASES[name]
    module = import_module(case.module)
    settings = getattr(module, f"{name.removesuffix('Trainer')}Config")
    args = settings(
        output_dir=str(out / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **case.settings,
    )
    given = {}
    if "reward_funcs" in case.given:
        given["reward_funcs"] = reward
    if "teacher_model" in case.given:  # by its folder, for trainers that look for its tokenizer
        tiny(seed=1).save_pretrained(out / "teacher")
        tokenizer().save_pretrained(out / "teacher")
        given["teacher_model"] = str(out / "teacher")
    return getattr(module, name)(
        model=scoring() if name == "RewardTrainer" else with_lora(tiny()),
        args=args,
        train_dataset=rows(case.rows),
        processing_class=tokenizer(),
        callbacks=[callback],
        **given,
    )


def guard(**options) -> grasp.GraspCallback:
    growing = {"tokens": 1, "every": 1, "refresh": 1, "read": 0.5, "rank": 2}
    return grasp.GraspCallback(reference=PROMPTS, **(growing | options))


@pytest.mark.parametrize("name", CASES)
def test_what_it_trains_is_kept_off(tmp_path, name):
    callback = grasp.GraspCallback(subspaces()) if name == "RewardTrainer" else guard()
    made = trainer(name, tmp_path, callback)
    before = deltas(made.model)
    made.train()
    after = deltas(made.model)
    assert through(callback.guard, before, after) <= 1e-6
    # Some keep a second adapter to compare with, which nothing trains.
    moved = [float((after[n] - before[n]).norm()) for n in before if n.endswith("|default")]
    assert len(moved) == 14 and min(moved) > 0
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["holds"]
    assert hooks(made.model) == 0


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_without_its_pins_it_would_leak(tmp_path, monkeypatch, name):
    monkeypatch.setattr(grasp.Guard, "_pin", lambda self, optimizer: None)
    callback = guard()
    made = trainer(name, tmp_path, callback)
    before = deltas(made.model)
    with pytest.warns(UserWarning, match="does not hold"):
        made.train()
    assert through(callback.guard, before, deltas(made.model)) > 1e-3


def test_a_reward_model_has_no_distribution_to_compare(tmp_path):
    with pytest.raises(ValueError, match="ForSequenceClassification gives no.*give subspaces"):
        trainer("RewardTrainer", tmp_path, guard()).train()


def test_the_adapter_may_be_the_trainers_own(tmp_path):
    trl = import_module("trl")
    tiny().save_pretrained(tmp_path / "base")
    callback = guard()
    made = trl.SFTTrainer(
        model=str(tmp_path / "base"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            learning_rate=1e-2,
            packing=True,
            max_length=32,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows("messages"),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    before = deltas(made.model)
    made.train()
    assert through(callback.guard, before, deltas(made.model)) <= 1e-6


def test_every_trainer_is_told_of():
    told = set(re.findall(r"`(\w+Trainer)`", DOCS))
    assert set(CASES) <= told
    # None of TRL's own is forgotten.
    assert {n for n in import_module("trl").__all__ if n.endswith("Trainer")} <= told
