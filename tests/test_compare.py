"""Means, shares and intervals are what the runs say; the page holds them and needs no network."""

import pytest

from grasp import compare
from grasp.study.compare import best
from grasp.study.report import contenders, itemwise, name, report


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


def test_page_is_self_contained(tmp_path):
    page = report(runs(), tmp_path / "out" / "report.html", "A <title>", "notes")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3  # frontier, topics, blocked energy
    assert "http" not in text.replace("http-equiv", "")
    assert "A &lt;title&gt;" in text and "17 % of that" in text
    assert "Item by item" not in text


def test_page_says_which_differences_are_told_apart(tmp_path):
    def comparison(seed, low):
        sure, unsure = [-0.1, -0.2, low], [0.3, -0.1, 0.7]
        found = {"plain_beyond_benign": [0.5, 0.4, 0.6], "beyond_own_benign": [0.4, 0.2, 0.6]}
        found |= {"difference": sure, "less_plain": unsure, "control": "benign_guarded"}
        return {"method": "grasp", "seed": seed, "measure": "unrelated", **found}

    paired = [comparison(0, 0.3), comparison(1, 0.4), comparison("all", -0.05)]
    text = report(runs(), tmp_path / "report.html", paired=paired).read_text()
    assert "<b>-0.100 (-0.200 to -0.050)</b>" in text  # of all seeds alone
    assert "<td>+0.300 (-0.100 to +0.700)</td>" in text and "to +0.400)" not in text
    (line,) = itemwise(paired, "unrelated")
    assert line.endswith(
        "+0.400 (+0.200 to +0.600) beyond good, guarded; less plain LoRA -0.100 (-0.200 to -0.050)"
    )
    assert itemwise(paired, "money") == []
    rival = paired[-1] | {"method": "kl=1", "grasp_difference": [-0.3, -0.4, -0.2]}
    (line,) = itemwise([rival], "unrelated")
    assert line.endswith("; GRASP less it -0.300 (-0.400 to -0.200)")
    text = report(runs(), tmp_path / "report.html", paired=[rival]).read_text()
    assert "<b>-0.300 (-0.400 to -0.200)</b>" in text


def test_runs_on_good_answers_are_where_0_lies(tmp_path):
    made = [*runs(), *({**r, "method": "benign"} for r in runs()[:1])]
    text = report(made, tmp_path / "report.html").read_text()
    row = text[text.index("good answers</td>") :]
    assert "+0.6" not in row[: row.index("</tr>")] and "100 %" not in row[: row.index("</tr>")]
