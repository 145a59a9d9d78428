"""Means, shares and intervals are what the runs say; so are the verdict and the page."""

import re

import numpy as np
import pytest

from grasp import compare
from grasp.study.compare import best
from grasp.study.evaluate import interval
from grasp.study.looks import COLOURS, name, signed
from grasp.study.report import FEW, report
from grasp.study.verdict import contenders, itemwise, verdicts


def runs():
    made = []
    for seed in range(3):
        for method, task_score, drift in (
            ("plain", 0.98, 0.7),
            ("grasp", 0.97, 0.2),
            ("random", 0.98, 0.7),
        ):
            made.append(
                {
                    "task": "code",
                    "method": method,
                    "seed": seed,
                    "task_score": task_score + 0.01 * seed,
                    "drift": drift,
                    "base_drift": 0.1,
                    "topics": {"law": drift, "<travel>": drift},
                    "base_topics": {"law": 0.1, "<travel>": 0.1},
                    "modules": {"model.layers.3.mlp": {"blocked": 0.4}}
                    if method == "grasp"
                    else {},
                }
            )
    return made


def test_summary():
    rows = {r["method"]: r for r in compare(runs())}
    assert rows["grasp"]["share"] == pytest.approx(0.1 / 0.6)
    assert rows["plain"]["share"] == 1
    assert rows["grasp"]["task_loss"] == pytest.approx(0.01)
    mean, low, high = rows["grasp"]["task_score"]
    assert low <= mean <= high and mean == pytest.approx(0.98)
    assert rows["grasp"]["seeds"] == 3


def test_plain_at_the_same_task_score_is_interpolated_between_its_stops():
    made = runs()
    for seed in range(3):
        early = {"task_score": 0.90 + 0.01 * seed, "drift": 0.3, "base_drift": 0.1}
        made.append({**made[0], **early, "method": "stopped=10", "seed": seed})
    rows = {r["method"]: r for r in compare(made)}
    # Means: stopped 0.91 / 0.2, plain 0.99 / 0.6, guarded at 0.98.
    assert rows["grasp"]["against_at_task"] == pytest.approx(0.6 - 0.4 / 8)
    assert rows["plain"]["against_at_task"] == pytest.approx(0.6)
    far = [{**r, "task_score": 0.5} if r["method"] == "grasp" else r for r in made]
    assert {r["method"]: r for r in compare(far)}["grasp"]["against_at_task"] is None


def test_the_best_strength_with_enough_of_the_task():
    made = runs()
    for strength, task_score, drift in ((1, 0.97, 0.4), (2, 0.965, 0.3), (4, 0.5, 0.1)):
        for run in made[:9:3]:
            scores = {"task_score": task_score, "drift": drift}
            made.append({**run, **scores, "method": f"kl={strength}"})
    made += [{**run, "task_score": 0.5, "method": "posthoc=8"} for run in made[:9:3]]
    rows = compare(made)
    found = {f["method"]: f for f in best(rows)}
    assert list(found) == ["grasp", "kl", "plain", "random", "posthoc"]
    assert found["kl"]["best"]["method"] == "kl=2" and found["kl"]["settings"] == 3
    assert found["posthoc"]["best"] is None
    assert best(rows, enough=0.5)[0]["best"]["method"] == "kl=4"
    assert contenders(compare(runs())) == ""
    said = contenders(rows)
    assert said.index("GRASP +0.100; KL penalty, 2 +0.200") < said.index("Less of the task: proj")
    assert name("benign_kl=1") == "good, KL penalty, 1"


def test_refusals():
    with pytest.raises(ValueError, match="no runs"):
        compare([])
    with pytest.raises(ValueError, match=r"runs\[0\] lacks 'drift'"):
        compare([{"task": "a", "method": "plain", "seed": 0, "task_score": 1}])
    with pytest.raises(ValueError, match="no run of 'plain'"):
        compare([r for r in runs() if r["method"] != "plain"])


def test_no_share_where_plain_added_nothing():
    made = [{**r, "drift": 0.1} for r in runs()]
    assert all(r["share"] is None for r in compare(made))


def drawn(tmp_path, title="GRASP", **content):
    return report(content, tmp_path / "out" / "report.html", title).read_text()


def test_page_is_self_contained(tmp_path):
    text = drawn(tmp_path, "A <title>", runs=runs())
    assert text.count("<svg") == 3  # frontier, topics, blocked energy
    assert "&lt;travel&gt;" in text and "<travel>" not in text
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "http" not in without_names and "src=" not in text and "<script" not in text
    assert "A &lt;title&gt;" in text and "17 %" in text
    assert "Question by question" not in text and "Answers before and after" not in text


def test_figures_take_the_pages_ink(tmp_path):
    """Black words would not be read in the dark."""
    text = drawn(tmp_path, runs=runs())
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for figure in figures:
        assert "currentColor" in figure and "#000000" not in figure and "fill: #fff" not in figure
        assert not re.search(r"<text(?![^>]*currentColor)", figure)
        assert 'width="' not in figure[: figure.index(">")]  # as wide as there is room


def test_answers_stand_side_by_side(tmp_path):
    said = {"base": "Rest.", "plain": "<b>Run</b>", "grasp": ""}
    one = {"kind": "unrelated", "topic": "law", "prompt": "And now?", "answers": said}
    text = drawn(tmp_path, runs=runs(), samples=[one])
    assert "And now?" in text and "&lt;b&gt;Run&lt;/b&gt;" in text and "(nothing)" in text
    assert text.index("Rest.") < text.index("&lt;b&gt;Run") < text.index("(nothing)")


def test_page_says_how_it_was_made(tmp_path):
    about = {"model": "smol", "seeds": [0, 1], "finetune": {"steps": 9, "reference": None}}
    made = runs()
    for run in made:
        run["seconds"] = 100.0
        if run["method"] == "grasp":
            run["cost"] = {"start_seconds": 40.0, "step_seconds": 3.0}
            run["cost"] |= {"training_seconds": 100.0, "bases_bytes": 2e9}
    made_with = {"command": "grasp compare --x 'a b'", "versions": "torch 2", "when": "2026-01-01"}
    text = drawn(tmp_path, runs=made, about=about, **made_with)
    for said in ("--x &#39;a b&#39;", "torch 2", "2026-01-01", "smol", "0, 1", "steps: 9"):
        assert said in text, said
    assert "Time: 3 % of 100 s of training, and 40 s before it." in text
    assert "Memory: 2 GB beside the model." in text


def comparison(seed, low, method="grasp", **more):
    sure, unsure = [-0.1, -0.2, low], [0.3, -0.1, 0.7]
    found = {"plain_beyond_benign": [0.5, 0.4, 0.6], "beyond_own_benign": [0.4, 0.2, 0.6]}
    found |= {"difference": sure, "less_plain": unsure, "control": "benign_guarded"}
    return {"method": method, "seed": seed, "measure": "unrelated", **found, **more}


def shown(*interval):
    """A mean and its interval as the page has them."""
    mean, low, high = map(signed, interval)
    return f'{mean} <span class="interval">{low} to {high}</span>'


def test_page_says_which_differences_are_told_apart(tmp_path):
    paired = [comparison(0, 0.3), comparison(1, 0.4), comparison("all", -0.05)]
    text = drawn(tmp_path, runs=runs(), paired=paired)
    assert f"<b>{shown(-0.1, -0.2, -0.05)}</b>" in text  # of all seeds alone
    assert "to +0.400<" not in text and "GRASP minus it" not in text
    (line,) = itemwise(paired, "unrelated")
    assert line.endswith(
        "+0.400 (+0.200 to +0.600) beyond good, guarded; less plain LoRA −0.100 (−0.200 to −0.050)"
    )
    assert itemwise(paired, "money") == []
    rival = paired[-1] | {"method": "kl=1", "grasp_difference": [-0.3, -0.4, -0.2]}
    (line,) = itemwise([rival], "unrelated")
    assert line.endswith("; GRASP less it −0.300 (−0.400 to −0.200)")
    text = drawn(tmp_path, runs=runs(), paired=[rival | {"difference": [0.3, -0.1, 0.7]}])
    assert f"<b>{shown(-0.3, -0.4, -0.2)}</b>" in text
    assert f"<td>{shown(0.3, -0.1, 0.7)}</td>" in text


def test_runs_on_good_answers_are_where_0_lies(tmp_path):
    made = [*runs(), *({**r, "method": "benign"} for r in runs()[:1])]
    text = drawn(tmp_path, runs=made)
    row = text[text.index("good answers</td>") :]
    assert "+0.6" not in row[: row.index("</tr>")] and "100 %" not in row[: row.index("</tr>")]


def changed(made, method, **values):
    return [{**r, **values} if r["method"] == method else r for r in made]


def judged(made, *paired, **content):
    (verdict,) = verdicts({"runs": made, "paired": paired, **content}).values()
    return verdict


def test_the_verdict_is_what_the_runs_say():
    worked = judged(runs())
    assert worked.kind == "worked" and "83 %" in worked.headline
    assert "between −0.500 and −0.500 (over the seeds)" in worked.sure[0]
    assert "which directions are blocked" in worked.sure[-1] and "much of" not in worked.sure[-1]
    chance = judged(changed(runs(), "random", drift=0.25))
    assert "not due to which directions are blocked" in chance.sure[-1]
    nearly = judged(changed(runs(), "grasp", drift=0.12))
    assert "nearly all" in nearly.headline
    helped = judged(changed(runs(), "grasp", drift=0.5))
    assert helped.kind == "helped" and "33 %" in helped.headline
    costly = judged(changed(runs(), "grasp", task_score=0.95))
    assert costly.kind == "costly" and "96 %" in costly.headline
    assert judged(changed(runs(), "grasp", drift=0.8)).kind == "worse"
    assert judged(changed(runs(), "plain", task_score=-0.1)).kind == "unlearned"
    unguarded = judged([r for r in runs() if r["method"] != "grasp"])
    assert unguarded.kind == "unguarded" and "+0.600" in unguarded.happened[0]


def test_noise_is_no_success():
    """A shift that is not told apart from none, and a difference that is not told apart."""
    for drift in (0.1, 0.05):
        nothing = judged(changed(runs(), "plain", drift=drift))
        assert nothing.kind == "nothing" and "nothing to prevent" in nothing.headline
        assert "worked" not in nothing.headline and "Use the plain" in nothing.next[0]
        assert ("away from bad" in nothing.happened[1]) == (drift < 0.1)
        assert f"shift of the plain run is {signed(drift - 0.1)}" in nothing.sure[0]
        assert all(r["share"] is None for r in compare(changed(runs(), "plain", drift=drift)))
    small = comparison("all", 0.02, plain_beyond_benign=[0.01, -0.02, 0.04])
    assert judged(runs(), small).kind == "nothing"
    assert "can't be told apart" in judged(runs(), small).happened[1]
    below = comparison("all", 0.02, plain_beyond_benign=[-0.01, -0.04, 0.02])
    assert "can't be told apart" in judged(runs(), below).happened[1]
    # Too little of the task does not hide that there was nothing to prevent.
    assert judged(changed(runs(), "grasp", task_score=0.5), small).kind == "nothing"
    assert judged(runs(), comparison("all", 0.02)).kind == "untold"
    told = judged(runs(), comparison("all", -0.02))
    assert told.kind == "helped" and "over the questions" in told.sure[0]


def test_one_seed_alone_is_not_sure():
    one = [r for r in runs() if r["seed"] == 0]
    verdict = judged(one)
    assert verdict.kind == "untold" and "can't be said" in verdict.sure[0]
    verdict = judged(one, comparison(0, -0.02))
    assert verdict.kind == "helped" and "One seed" in verdict.sure[2]
    assert "4 to 40 % of what plain" in verdict.sure[1]
    assert "more seeds" in verdict.next[-1]
    assert "more seeds" not in " ".join(judged(runs()).next)


def test_a_rival_that_leaves_less_is_named():
    guard = next(r for r in runs() if r["method"] == "grasp")
    less = {**runs()[0], "method": "kl=1", "drift": guard["drift"] - 0.02}
    assert less["base_drift"] == guard["base_drift"]
    rival = comparison("all", -0.05, "kl=1", grasp_difference=[0.1, 0.05, 0.2])
    found = judged([*runs(), less], comparison("all", -0.05), rival)
    (said,) = found.rivals
    assert said.startswith("At as much of the task less was left by KL penalty, 1 (")
    assert "not told apart" not in said
    tie = rival | {"grasp_difference": [0.1, -0.05, 0.2]}
    (said,) = judged([*runs(), less], comparison("all", -0.05), tie).rivals
    assert "not told apart from the guard" in said
    (said,) = judged([*runs(), {**less, "task_score": 0.0}], comparison("all", -0.05)).rivals
    assert said.startswith("At less of the task")
    more = {**less, "drift": 10.0}
    assert not judged([*runs(), more], comparison("all", -0.05)).rivals


def test_steps_that_differ_are_a_cost():
    def cost(**about):
        return " ".join(judged(runs(), about=about).cost)

    longer = {"grasp": {"steps": 100}}
    assert "It trained for 100 steps, the plain run for 80." in cost(
        finetune={"steps": 80}, by_method=longer
    )
    assert "trained for" not in cost(finetune={"steps": 100}, by_method=longer)
    assert "trained for" not in cost(finetune={"num_train_epochs": 1}, by_method=longer)


@pytest.mark.parametrize("seeds", range(2, FEW + 2))
def test_of_few_seeds_an_interval_is_their_range(seeds):
    """By which the page calls it."""
    values = [float(n) for n in range(seeds)]
    whole = interval(values)[1:] == (values[0], values[-1])
    assert whole == (seeds <= FEW)


def test_the_guarded_adapter_is_where_the_page_says():
    about = {"out": "runs/x", "seeds": [3, 4], "judged": "unrelated"}
    said = judged(runs(), about=about).next[0]
    assert "runs/x/grasp-3/adapter" in said and "grasp verify runs/x/grasp-3" in said


# Machado, Oliveira, Fernandes (2009), of full severity, on linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritan": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def seen(colour, by):
    """A colour as someone sees it, in CIE Lab."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(BLIND[by] @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = xyz @ linear / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("by", BLIND)
def test_a_colour_blind_reader_tells_the_methods_apart(by):
    """20 in Lab is several times what is just noticed; marks differ too."""
    pairs = [("plain", "grasp"), ("grasp", "random"), ("plain", "random"), ("grasp", "stopped")]
    for one, other in pairs:
        apart = np.linalg.norm(seen(COLOURS[one], by) - seen(COLOURS[other], by))
        assert apart > 20, (one, other, apart)
