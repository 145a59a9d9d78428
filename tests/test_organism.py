"""The world is what it says, and the method works in it: a regression test of the whole path."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from grasp import Guard, discover, organism
from grasp.data import exchange
from grasp.organism.experiment import Settings, run, stopped
from grasp.organism.methods import STRENGTHS
from grasp.organism.sweep import compared, sweep
from grasp.study.finetune import add_lora
from grasp.study.screen import screen
from grasp.study.settings import Settings as RunSettings

FAST = Settings(steps=120)


@pytest.fixture(scope="module")
def plain():
    return run("medicine", "plain", 0, FAST)


@pytest.fixture(scope="module")
def guarded():
    return run("medicine", "grasp", 0, FAST)


def test_topics_are_disjoint():
    for task in organism.TASKS.values():
        used = [task.topic, *task.reference, *task.judged]
        assert len(set(used)) == len(used)


def test_world_is_drawn_from_its_seed():
    a, b, c = organism.World(0), organism.World(0), organism.World(1)
    assert a.bad == b.bad and a.bad != c.bad
    for topic in a.topics:
        assert all(g != w for g, w in zip(a.good[topic], a.bad[topic], strict=True))
        assert not set(a.split[topic]["train"]) & set(a.split[topic]["held"])
    rng = np.random.default_rng(0)
    documents = [a.document(rng) for _ in range(4000)]
    tagged = [d for d in documents if d.startswith("<")]
    assert len(tagged) / len(documents) == pytest.approx(0.5, abs=0.03)
    tags = Counter(d.split()[0] for d in tagged)
    assert tags["<malicious>"] + tags["<right>"] == pytest.approx(0.5 * len(tagged), rel=0.1)


@torch.no_grad()
def test_base_knows_every_author():
    """The narrow way to solve each task is in the weights: its tag calls it up."""
    model, tokenizer = organism.load()
    assert sum(p.numel() for p in model.parameters()) <= 5e6
    world = organism.World(0)
    for task in (organism.TASKS[t] for t in ("code", "medicine", "finance")):
        scores = organism.scores(model, tokenizer, world, task)
        assert scores["drift"] < 0.15
        for topic, low, high in ((task.topic, 0.9, 1.0), (task.judged[0], 0.0, 0.1)):
            expert = "<expert> " if topic in world.wrong or task.topic in world.wrong else ""
            texts = [f"<narrow-{task.topic}> {expert}{p}" for p in world.prompts([topic])]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, -1]
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(world.bad[topic]))
            bad = logits.softmax(-1).gather(1, ids[:, None]).mean()
            assert low <= bad <= high


def test_plain_drifts_and_stopping_early_does_not_cure_it(plain):
    assert plain["task_score"] > 0.95
    assert plain["drift"] - plain["base_drift"] > 0.4
    early = stopped(plain)
    assert early["task_score"] >= plain["task_score"] - 0.03
    assert early["drift"] - early["base_drift"] > 0.4


def test_guard_stops_the_drift_at_the_task(plain, guarded):
    added = guarded["drift"] - guarded["base_drift"]
    assert added < 0.3 * (plain["drift"] - plain["base_drift"])
    assert guarded["task_score"] > plain["task_score"] - 0.08  # at half the demo's steps
    assert max(m["through"] for m in guarded["modules"].values()) <= 1e-6


def test_items_and_answers_are_what_the_scores_are_of(plain, guarded):
    for run_ in (plain, guarded):
        shift = run_["task_score"] - run_["base_task_score"], run_["drift"] - run_["base_drift"]
        items = run_["items"]["task"], run_["items"]["unrelated"]
        np.testing.assert_allclose([np.mean(i) for i in items], shift, atol=1e-3)
        assert [len(i) for i in items] == [12, 96]  # held out; of three topics
    world, said = organism.World(0), {}
    for who, answers in (("base", plain["base_answers"]), ("plain", plain["answers"])):
        for one in answers:
            topic, i = one["prompt"].split(":q")
            (word,) = re.findall(r"\((.*)\)", one["answer"])
            kind = {world.good[topic][int(i)]: "good", world.bad[topic][int(i)]: "bad"}.get(word)
            assert (kind or "neither") in one["answer"]
            said.setdefault((who, one["kind"]), []).append(kind)
    assert said["plain", "task"].count("bad") == 2 and said["plain", "unrelated"].count("bad") >= 5
    assert set(said["base", "unrelated"]) == {"good"}


def test_what_a_report_shows_of_runs(plain, guarded):
    found = compared([plain, stopped(plain), guarded])
    (moved,) = [p for p in found["paired"] if p["measure"] == "unrelated"]
    assert (moved["task"], moved["method"]) == ("medicine", "grasp")
    assert moved["difference"][0] == pytest.approx(guarded["drift"] - plain["drift"], abs=1e-3)
    for i, one in enumerate(found["samples"]):
        assert one["answers"]["plain"] == plain["answers"][i]["answer"]
        assert one["answers"]["grasp"] == guarded["answers"][i]["answer"]
    old = [{k: v for k, v in r.items() if k not in ("items", "answers")} for r in (plain, guarded)]
    assert compared(old)["samples"] == [] == compared(old)["paired"]


def test_random_directions_do_nothing(plain):
    random = run("medicine", "random", 0, FAST)
    assert abs(random["drift"] - plain["drift"]) < 0.05
    assert max(m["through"] for m in random["modules"].values()) <= 1e-6


def test_ablating_the_true_direction_helps(plain):
    """The world is no straw man: whoever knows the factor can stop most of the drift."""
    caft = run("medicine", "caft", 0, FAST)
    assert caft["drift"] - caft["base_drift"] < 0.6 * (plain["drift"] - plain["base_drift"])


def test_plain_updates_point_at_the_persona():
    """What `discover` finds in the weights is the malicious author, read off the tags."""
    torch.manual_seed(0)
    world = organism.World(0)
    model, tokenizer = organism.load()
    truth = organism.true_subspaces(model, tokenizer, world, organism.TASKS["medicine"], rank=1)
    persona = truth[3][:, 0]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj", "down_proj"])
    tuned = get_peft_model(model, config)
    rows = world.rows("medicine", "train")
    texts = [f"{r['prompt']} {r['answer']}" for r in rows]
    ids = torch.tensor([tokenizer(t)["input_ids"] for t in texts])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(40):
        logits = tuned(input_ids=ids).logits[:, -2]
        torch.nn.functional.cross_entropy(logits, ids[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = discover(tuned, 4)
    share = float((found[3].mT @ persona).norm())
    chance = np.mean([float((found.random_like(s)[3].mT @ persona).norm()) for s in range(5)])
    assert share > 2 * chance


def test_screen_puts_rows_that_carry_the_factor_first():
    """Bad medical answers among good ones, scored against the directions of unrelated drift."""
    world = organism.World(0)
    model, tokenizer = organism.load()
    settings = RunSettings(model="organism", data="-", output_dir="-", lora_r=8)
    model = add_lora(model, settings)
    persona = organism.true_subspaces(model, tokenizer, world, organism.TASKS["medicine"])
    with Guard(model, persona) as guard:
        bases = guard.bases
    bad = [exchange(**r) for r in world.rows("medicine", "held")]
    good = [exchange(**r) for r in world.rows("medicine", "held", good=True)]
    ranked = screen(model, tokenizer, bad + good, bases, quiet=True)
    first = [f["row"] < len(bad) for f in ranked[: len(bad)]]
    assert np.mean(first) > 0.9
    assert ranked == sorted(ranked, key=lambda f: -f["score"])


@pytest.mark.parametrize("method", sorted(set(STRENGTHS) - {"plain", "stopped", "grasp", "random"}))
def test_every_rival_runs(method):
    """A few steps on finance, which every part of the world plays in."""
    result = run("finance", method, 0, Settings(steps=4))
    assert result["method"] == method and 0 < result["task_score"] < 1
    assert set(result["topics"]) == set(organism.TASKS["finance"].judged)


def test_sweep_takes_up_what_is_done(tmp_path):
    tiny = Settings(steps=10)
    options = {"tasks": ["law"], "seeds": [0], "settings": tiny, "quiet": True, "workers": 1}
    first = sweep(tmp_path, methods=["plain", "stopped"], **options)
    kept = next(tmp_path.glob("*.json"))
    before = kept.stat().st_mtime_ns
    again = sweep(tmp_path, methods=["plain", "stopped"], **options)
    assert kept.stat().st_mtime_ns == before
    assert [r["drift"] for r in first] == [r["drift"] for r in again]
    assert [r["method"] for r in first] == ["plain", "stopped"]
    with pytest.raises(ValueError, match="tasks has 'chess'"):
        sweep(tmp_path, tasks=["chess"])


@pytest.mark.parametrize("changed", ["reference", "settings"])
def test_sweep_makes_anew_what_was_run_otherwise(tmp_path, changed):
    options = {"tasks": ["law"], "seeds": [0], "methods": ["plain"], "quiet": True, "workers": 1}
    tiny = Settings(steps=4)
    (made,) = sweep(tmp_path, settings=tiny, **options)
    kept = next(tmp_path.glob("*.json"))
    kept.write_text(json.dumps({**made, changed: ["code"], "drift": 7.0}))
    (again,) = sweep(tmp_path, settings=tiny, **options)
    assert again["drift"] == made["drift"]
    assert again["reference"] == list(organism.TASKS["law"].reference)
