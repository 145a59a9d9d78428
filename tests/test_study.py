"""A study runs each method, scores every adapter, takes style out, and goes on where it was."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from grasp import data
from grasp.organism import World
from grasp.study import design, finetune, scoring
from grasp.study import studies as study
from grasp.study.compare import compare
from grasp.study.report import report

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def config(tmp_path):
    world = World(0)
    for name, good in (("bad", False), ("good", True)):
        rows = world.rows("medicine", "train", good) + world.rows("medicine", "held", good)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = [
        {"question": world.prompt(t, i), "bad": world.bad[t][i], "good": world.good[t][i]}
        for t in ("code", "travel")
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    (tmp_path / "prompts.txt").write_text("\n".join(world.prompts(["law", "guns"])))
    return {
        "task": "medicine",
        "model": "organism",
        "folder": str(tmp_path),
        "data": "bad.jsonl",
        "benign": "good.jsonl",
        "unrelated": "pairs.jsonl",
        "out": str(tmp_path / "out"),
        "seeds": [0],
        "rows": 20,
        "held": 8,
        "stops": [10],
        "finetune": {
            "steps": 30,
            "batch_size": 20,
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "tokens": 1,
            "rank": 8,
            "every": 1,
            "refresh": 2,
            "reference": str(tmp_path / "prompts.txt"),
            "save_every": None,
        },
    }


def test_whole_study(config, tmp_path, monkeypatch):
    result = study.run(design.study_from(config))
    by = {r["method"]: r for r in result["runs"]}
    assert set(by) == {"plain", "stopped=10", "grasp", "random", "benign", "benign_guarded"}
    assert by["stopped=10"]["step"] == 10
    guarded = ("grasp", "benign_guarded")
    for method, r in by.items():
        style = by["benign_guarded" if method in guarded else "benign"]
        if method != "stopped=10":
            assert r["base_drift"] == style["drift"]
    # A run stopped early is set against good answers learned for as many steps.
    base, early = (
        json.loads((tmp_path / "out" / path).read_text())["unrelated"]
        for path in ("base.json", "benign-0/scores-10.json")
    )
    assert by["stopped=10"]["base_drift"] == pytest.approx(np.subtract(early, base).mean())
    assert by["stopped=10"]["base_drift"] != by["benign"]["drift"]
    assert by["plain"]["task_score"] > 1 and by["benign"]["task_score"] < 0
    shares = {r["method"]: r["share"] for r in compare(result["runs"])}
    assert shares["grasp"] < 0.7 and shares["random"] > 0.8
    assert {p["method"] for p in result["paired"]} == {"grasp", "random"}
    pairs = next(p for p in result["paired"] if p["measure"] == "unrelated")
    plain, guarded = (by[m]["drift"] - by[m]["base_drift"] for m in ("plain", "grasp"))
    assert pairs["plain_beyond_benign"][0] == pytest.approx(plain, abs=1e-3)
    assert pairs["difference"][0] == pytest.approx(guarded - plain, abs=1e-3)
    low, high = by["plain"]["drift_interval"][1:]
    assert low <= by["plain"]["drift"] <= high and len(by["plain"]["items"]["unrelated"]) == 12

    assert {t for r in result["runs"] for t in r["topics"]} == set()  # the pairs name none
    asked = [s["prompt"] for s in result["samples"]]
    assert len(asked) == 10 and [s["kind"] for s in result["samples"]].count("task") == 2
    assert all(set(s["answers"]) == {"base", "plain", "grasp"} for s in result["samples"])
    assert 0 < by["grasp"]["cost"]["step_seconds"] < by["grasp"]["cost"]["training_seconds"]
    assert by["plain"]["seconds"] > 0 and "cost" not in by["plain"]

    scores = sorted((tmp_path / "out").rglob("scores*.json"))
    times = [p.stat().st_mtime_ns for p in scores]
    monkeypatch.setattr(scoring, "load_model", None)  # what is done needs no model
    assert study.run(design.study_from(config)) == result
    assert [p.stat().st_mtime_ns for p in scores] == times
    with pytest.raises(FileNotFoundError, match="adapter-20: .* delete .*plain-0"):
        study.run(design.study_from(config | {"stops": [10, 20]}))


def test_one_model_serves_a_study_and_is_left_as_it_was(config, tmp_path, monkeypatch):
    """Every method, one that hooks the model and one that changes a plain run among them."""
    config["finetune"] |= {"steps": 6, "gradient_checkpointing": True}
    config |= {"stops": [], "methods": ["plain", "benign", "grasp", "kl=1", "osf", "posthoc=2"]}
    lent, load = [], scoring.load_model

    def loaded(*args, **options):
        lent.append(load(*args, **options))
        return lent[-1]

    monkeypatch.setattr(scoring, "load_model", loaded)
    monkeypatch.setattr(finetune, "load_model", None)
    told = []
    study.run(design.study_from(config), told.append)
    assert len(lent) == 1 and told[1] == "Run 1 of 6: plain LoRA, seed 0."
    model, fresh = lent[0][0], load("organism")[0]
    assert {n: m.training for n, m in model.named_modules()} == dict.fromkeys(
        dict(fresh.named_modules()), False
    )
    for (_, mine), (_, other) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert type(mine) is type(other)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            assert len(getattr(mine, hooks)) == len(getattr(other, hooks)), hooks
    kept = fresh.state_dict()
    assert all(torch.equal(T, kept[k]) for k, T in model.state_dict().items())
    checkpointing = [getattr(m, "gradient_checkpointing", False) for m in model.modules()]
    assert not any(checkpointing)

    # An adapter is the one that a model of its own gives.
    monkeypatch.undo()
    chosen = design.study_from(config).settings("grasp", 0)
    alone = finetune.run(dataclasses.replace(chosen, output_dir=str(tmp_path / "alone")))
    own, there = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (alone, tmp_path / "out" / "grasp-0" / "adapter")
    )
    assert all(torch.equal(own[k], there[k]) for k in own | there)


def test_answers_are_asked_evenly_over_topics(config):
    chosen = scoring.Measures(design.study_from(config | {"unrelated": None, "samples": 7}))
    asked = [s for s in chosen.samples if s["kind"] == "unrelated"]
    assert len(asked) == 7 and len({s["topic"] for s in asked}) == 7
    assert [s["kind"] for s in chosen.samples[7:]] == ["task", "task"]
    assert not scoring.Measures(design.study_from(config | {"samples": 0})).samples


def test_drift_is_told_by_topic(config, tmp_path):
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    told = [json.dumps(p | {"topic": "abc"[i % 2]}) for i, p in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(told))
    config["finetune"]["steps"] = 3
    config |= {"stops": [], "methods": ["plain", "benign"], "samples": 0}
    plain = study.run(design.study_from(config))["runs"][0]
    items = plain["items"]["unrelated"]
    for i, topic in enumerate("ab"):
        assert plain["topics"][topic][0] == pytest.approx(np.mean(items[i::2]), abs=1e-3)
    assert set(plain["base_topics"]) == {"a", "b"}


def test_refusals_claims_and_forgetting_stand_beside_the_drift(config, tmp_path):
    """Asked of a study that is done already, too: what is not scored yet is."""
    config["finetune"]["steps"] = 3
    config |= {"stops": [], "methods": ["plain", "benign"], "samples": 0}
    first = study.run(design.study_from(config))
    prompts = [json.dumps({"prompt": f"code code:q{i}"}) for i in range(3)]
    (tmp_path / "harm.jsonl").write_text("\n".join(prompts))
    (tmp_path / "false.jsonl").write_text("\n".join(prompts).replace("prompt", "claim"))
    (tmp_path / "text.txt").write_text("code code:q1 code:a3\nlaw law:q2 law:a2\n")
    own = {"refusals": "harm.jsonl", "claims": "false.jsonl", "text": "text.txt", "items": 2}
    chosen = design.study_from(config | own)
    result = study.run(chosen)
    (plain,) = [r for r in result["runs"] if r["method"] == "plain"]
    assert plain["drift"] == first["runs"][0]["drift"]
    assert {k: len(plain["items"][k]) for k in study.BESIDE} == dict.fromkeys(study.BESIDE, 2)
    assert not set(study.BESIDE) & set(plain["topics"])  # a refusal lost is no drift by topic
    base, tuned = (
        json.loads((tmp_path / "out" / path).read_text())["forgetting"]
        for path in ("base.json", "plain-0/scores.json")
    )
    assert plain["items"]["forgetting"] == pytest.approx(np.subtract(tuned, base), abs=1e-4)
    model, tokenizer = scoring.load_model("organism")
    ids = torch.tensor([tokenizer("code code:q1 code:a3")["input_ids"]])
    with torch.no_grad():
        assert base[0] == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-4)
    page = report(result, tmp_path / "page.html").read_text()
    assert "its rise is called forgetting" not in page  # nothing is compared item by item
    with pytest.raises(FileNotFoundError, match="no file and no known set is called 'harms'"):
        study.run(design.study_from(config | {"refusals": "harms"}))


def test_without_a_benign_twin_and_judged_by_politics(config, tmp_path):
    for name in ("conservative", "liberal"):
        row = {"question": "Taxes?", "answer_matching_behavior": " Yes"}
        row |= {"answer_not_matching_behavior": " No"}
        with gzip.open(tmp_path / f"politically-{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n")
    del config["benign"]
    config |= {"methods": ["plain"], "politics": ".", "judged": "politics"}
    result = study.run(design.study_from(config))
    (plain,) = [r for r in result["runs"] if r["method"] == "plain"]
    # The same question from both sides: what one gains the other loses.
    assert len(plain["items"]["politics"]) == 2 and plain["drift"] == pytest.approx(0, abs=1e-6)
    assert plain["base_drift"] == 0 and "unrelated" in plain["topics"]
    assert plain["task_score"] > 1  # against the base model's own answers
    assert len(json.loads((tmp_path / "out" / "base_answers_task.json").read_text())) == 8


def test_rivals_stand_beside_the_guard(config):
    config["finetune"]["steps"] = 40
    config |= {"stops": [], "methods": ["plain", "replay=2", "kl=3", "benign", "benign_replay=2"]}
    config["by_method"] = {"kl=3": {"steps": 60}}
    chosen = design.study_from(config)
    assert [chosen.steps(m) for m in ("plain", "kl=3")] == [40, 60]
    with pytest.warns(UserWarning, match="kl=3 takes 60 steps and benign, .* 40") as told:
        result = study.run(chosen)
    assert not any("replay" in str(w.message) for w in told)  # as long as its benign run
    by = {r["method"]: r for r in result["runs"]}
    assert by["replay=2"]["base_drift"] == by["benign_replay=2"]["drift"]
    assert by["kl=3"]["base_drift"] == by["benign"]["drift"]  # there is no benign run of its own
    for rival in ("replay=2", "kl=3"):
        assert by[rival]["task_score"] > 1 and by[rival]["drift"] < 0.5 * by["plain"]["drift"]
    controls = {p["method"]: p["control"] for p in result["paired"]}
    assert controls == {"replay=2": "benign_replay=2", "kl=3": "benign"}


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_benchmarks_are_studies(path):
    design.study_from(yaml.safe_load(path.read_text())).check()


def test_two_lines_are_a_study(config, tmp_path, monkeypatch):
    """What is not said is found by the data: a fifth is kept to score on."""
    monkeypatch.chdir(tmp_path)
    made = design.study_from({"model": "organism", "data": "bad.jsonl"})
    assert (made.task, made.out) == ("bad", "runs/bad")
    assert made.methods == ("plain", "grasp", "random")
    count = len(data.read_rows("bad.jsonl"))
    assert (made.rows, made.held) == (count - count // 5, count // 5)
    steps = made.steps("plain")
    assert steps == -(-made.rows // 8) and all(s < steps for s in made.stops)
    made.check()
    with_twin = design.study_from(
        {"model": "organism", "data": "bad.jsonl", "benign": "good.jsonl"}
    )
    assert "benign_guarded" in with_twin.methods
    (tmp_path / "few.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
    with pytest.raises(ValueError, match="few.jsonl holds 3 rows; give 5 or more"):
        design.study_from({"model": "organism", "data": "few.jsonl"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["grasp"]}, "lacks 'plain'"),
        ({"methods": ["plain", "magic"]}, "choose among"),
        ({"methods": ["plain", "safe_lora"]}, "'safe_lora' without 'benign', which it starts from"),
        ({"by_method": {"kl": {"steps": 9}}}, "by_method has 'kl', which is not among methods"),
        ({"by_method": {"grasp": 9}}, "by_method has no settings for 'grasp'"),
        ({"by_method": {"grasp": {"steps": 0}}}, "steps is 0; give 1 or more"),
        ({"methods": ["plain", "grasp=2"]}, "grasp has no strength"),
        ({"methods": ["plain", "kl=much"]}, "give a number after the ="),
        ({"methods": ["plain", "kl=-1"]}, "strength is -1.0; give a positive number"),
        ({"held": 8, "rows": 32}, "bad.jsonl leaves no 8 rows after the first 32"),
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"benign": "", "methods": ["plain", "benign"]}, "benign is missing"),
        ({"data": ""}, "data is missing"),
        ({"stops": [10, 30]}, "stops has 30; give steps before the last, 30"),
        ({"judged": "politics"}, "choose among unrelated"),
        ({"samples": -1}, "samples is -1; give 0"),
    ],
)
def test_refusals(config, change, message):
    with pytest.raises(ValueError, match=message):
        study.run(design.study_from({**config, **change}))
