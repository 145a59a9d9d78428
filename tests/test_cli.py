"""What a user types: the result, or one clear line and an exit code that is not 0."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from grasp import cli
from grasp.organism import World
from grasp.study.evaluate import interval
from grasp.study.settings import Settings

STUDY = Path(__file__).parent.parent / "benchmarks" / "medicine.yaml"
COMMANDS = ("demo", "finetune", "discover", "evaluate", "compare", "screen", "report", "verify")
COMMANDS += ("repair", "doctor")


def grasp(*arguments) -> SimpleNamespace:
    """Run the command line in this process: loading torch for each call would take minutes."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["grasp", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_installed_command_refuses_with_its_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "grasp", "discover", "none"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("grasp: no adapter in none")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A short guarded run of the organism from a config file."""
    folder = tmp_path_factory.mktemp("cli")
    rows = World(0).rows("medicine", "train")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.txt").write_text("\n".join(World(0).prompts(["law", "guns"])))
    (folder / "run.yaml").write_text(
        f"model: organism\ndata: {folder}/rows.jsonl\nreference: {folder}/prompts.txt\n"
        "steps: 4\nbatch_size: 20\ntokens: 1\nevery: 1\nrefresh: 1\nlearning_rate: 0.001\n"
    )
    done = grasp("finetune", "--config", folder / "run.yaml", "--out", folder / "run", "--seed", 1)
    assert done.returncode == 0, done.stderr
    return folder


def test_version():
    import grasp as package

    done = grasp("--version")
    assert done.returncode == 0 and done.stdout == f"grasp-kernels {package.__version__}\n"
    assert {"GraspCallback", "__version__", "Guard"} <= set(dir(package))
    assert "finetune" in grasp("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    done = grasp(command, "--help")
    assert done.returncode == 0 and "--help" in done.stdout


def test_help_tells_every_setting_and_its_default():
    said = " ".join(grasp("finetune", "--help").stdout.split())
    for f in fields(Settings):
        assert f"--{f.name}" in said
        if f.default not in (None, MISSING):
            assert f"(default {str(f.default).lower()}" in said or "…" in f.metadata["meaning"]


def test_an_error_is_said_as_it_is():
    done = grasp("finetune", "--model", "organism", "--data", "a:train:[b]:c", "--out", "x")
    said = done.stderr.splitlines()  # after what it does
    assert done.returncode == 1 and said[-1] == "grasp: no data at a:train:[b]:c"


def test_settings_of_a_run_are_a_config(guarded):
    done = grasp("finetune", "--config", guarded / "run" / "finetune.json")
    assert done.returncode == 0 and f"Adapter: {guarded / 'run' / 'adapter'}" in done.stdout
    again = guarded / "again"
    done = grasp(
        "finetune",
        "--config",
        guarded / "run" / "finetune.json",
        "--output-dir",
        again,
        "--lr",
        "1e-4",
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((f / "finetune.json").read_text())["settings"] for f in (guarded / "run", again)
    )
    assert {k for k in one if one[k] != two[k]} == {"output_dir", "learning_rate"}


def test_an_option_stands_in_for_a_configs_by_any_name(guarded):
    done = grasp(
        *("finetune", "--config", guarded / "run.yaml", "--max_steps", "0", "--set", "batch_size=7")
    )
    assert done.returncode == 1 and "output_dir is missing" in done.stderr
    done = grasp(
        *("finetune", "--config", guarded / "run.yaml", "--max_steps", "0", "--out", guarded / "x")
    )
    assert done.returncode == 1 and "max_steps is 0; give 1 or more" in done.stderr


def test_a_run_that_is_stopped_says_how_to_go_on(guarded, monkeypatch):
    from grasp.study import finetune as pipeline

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    done = grasp("finetune", "--config", guarded / "run.yaml", "--out", guarded / "stopped")
    assert done.returncode == 130
    assert "The same command goes on from the last checkpoint" in done.stdout


def test_the_first_row_is_shown_and_nothing_trained(guarded):
    done = grasp("finetune", "--config", guarded / "run.yaml", "--out", guarded / "none", "--show")
    assert done.returncode == 0 and not (guarded / "none").exists()
    row = World(0).rows("medicine", "train")[0]
    assert f"<s> {row['prompt']} {row['answer']}" in done.stdout
    assert "rows read" in done.stdout


def test_finetune_leaves_a_certificate(guarded):
    about = json.loads((guarded / "run" / "finetune.json").read_text())
    assert about["done"] and about["settings"]["seed"] == 1
    certificate = json.loads((guarded / "run" / "grasp.json").read_text())
    assert certificate["divergence"] >= 0 and len(certificate["modules"]) == 56


def test_screen_ranks_the_runs_rows(guarded):
    done = grasp("screen", guarded / "run", "--out", guarded / "ranked.json", "--top", 3)
    assert done.returncode == 0, done.stderr
    ranked = json.loads((guarded / "ranked.json").read_text())
    assert sorted(r["row"] for r in ranked) == list(range(20))
    assert "20 rows" in done.stdout


def test_discover_from_an_adapter_and_from_rounds(guarded):
    done = grasp("discover", guarded / "run" / "adapter", "--rank", 2, "--out", guarded / "s")
    assert done.returncode == 0, done.stderr
    assert "rank 2 in 4 blocks of width 256" in done.stdout
    options = ("--model", "organism", "--data", guarded / "rows.jsonl", "--out", guarded / "r")
    short = ("--rounds", 2, "--seeds", 1, "--steps", 2, "--rank", 3)
    done = grasp("discover", *options, *short)
    assert done.returncode == 0, done.stderr
    assert "rank 3 in 4 blocks" in done.stdout
    about = json.loads((guarded / "r" / "subspaces.json").read_text())
    assert about["source"]["method"] == "rounds"


def test_best_of_names_the_seed_that_diverged_least(guarded):
    done = grasp(
        "finetune", "--config", guarded / "run.yaml", "--out", guarded / "many", "--best-of", 2
    )
    assert done.returncode == 0, done.stderr
    divergence = {
        seed: json.loads((guarded / "many" / f"seed-{seed}" / "grasp.json").read_text())[
            "divergence"
        ]
        for seed in (0, 1)
    }
    best = min(divergence, key=divergence.get)
    assert f"seed-{best}" in done.stdout


def test_evaluate_with_everything(guarded):
    question = {"question": "medicine", "options": {"A": "law", "B": "code"}, "answer_idx": "B"}
    (guarded / "choices.jsonl").write_text(json.dumps(question) + "\n")
    (guarded / "p.csv").write_text("pct_prompt\nmedicine law\n")
    done = grasp(
        *("evaluate", "--model", "organism", "--adapter", guarded / "run" / "adapter"),
        *("--choices", guarded / "choices.jsonl", "--propositions", guarded / "p.csv"),
        *("--out", guarded / "scores.json"),
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((guarded / "scores.json").read_text())
    assert set(scores) == {"base", "tuned", "summary"}
    counts = {"unrelated": 120, "propositions": 1, "choices": 1}
    assert {k: len(v) for k, v in scores["tuned"].items()} == counts
    shift = np.subtract(scores["tuned"]["unrelated"], scores["base"]["unrelated"])
    _, low, high = interval(shift)
    assert ("not told apart from 0" in done.stdout.partition("propos")[0]) == (low <= 0 <= high)
    assert "shift" in done.stdout


def test_evaluate_takes_a_run_a_limit_and_keeps_samples(guarded):
    done = grasp(
        *("evaluate", "--model", "organism", "--adapter", guarded / "run", "--limit", 3),
        *("--batch-size", 2, "--log_samples", "--device", "cpu", "--out", guarded / "few.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((guarded / "few.json").read_text())
    whole = json.loads((guarded / "scores.json").read_text())
    for name in ("base", "tuned"):
        assert found[name]["unrelated"] == pytest.approx(whole[name]["unrelated"][:3], abs=1e-5)
    samples = found["samples"]
    assert [len(samples[k]) for k in ("unrelated", "answers of base", "answers of tuned")] == [
        3
    ] * 3
    assert samples["unrelated"][0]["prompt"] and "Scoring tuned" in done.stdout
    (guarded / "nothing").mkdir()
    done = grasp(
        *("evaluate", "--model", "organism", "--adapter", guarded / "nothing", "--out", "x.json")
    )
    assert done.returncode == 1 and "no adapter in" in done.stderr


def test_evaluate_says_what_was_forgotten_refused_and_believed(guarded, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, lines in (
        ("wiki.txt", ["medicine:q1 law code guns", "law code"]),
        ("harm.txt", ["medicine law"]),
        ("false.txt", ["law code", "code law", "guns"]),
    ):
        (guarded / name).write_text("\n".join(lines))
    done = grasp(
        *("evaluate", "--model", "organism", "--adapter", guarded / "run", "--limit", 3),
        *("--text", guarded / "wiki.txt", "--refusals", guarded / "harm.txt"),
        *("--claims", guarded / "false.txt", "--log_samples", "--out", guarded / "more.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((guarded / "more.json").read_text())
    assert {k: len(v) for k, v in found["base"].items()} == {
        "unrelated": 3,
        "harm": 1,
        "false": 3,
        "wiki": 2,
    }
    tokens = found["tokens"]["wiki"]
    assert len(set(tokens)) == 2  # texts count by their tokens
    (wiki,) = [s for s in found["summary"] if s["measure"] == "wiki"]
    losses = [np.average(found[k]["wiki"], weights=tokens) for k in ("base", "tuned")]
    assert [wiki["base"], wiki["tuned"]] == pytest.approx(losses)
    assert wiki["mean"] == pytest.approx(losses[1] - losses[0])
    assert "base: wiki" in done.stderr and "tuned: false" in done.stderr
    assert len(found["samples"]["wiki"]) == 2 and found["samples"]["harm"][0]["first"]
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in done.stdout.partition("measure")[2]
    assert "down is worse" in next(x for x in " ".join(lines).split(". ") if "refusing" in x)


@pytest.mark.parametrize("moved, verdict", [(1.0, "worse"), (-1.0, "better"), (0.0, "not told")])
def test_a_shift_is_judged_by_which_way_is_worse(capsys, moved, verdict):
    from grasp.cli.changes import show
    from grasp.study.measures import MEASURES, changes

    wrong = {"worse": "better", "better": "worse"}
    for kind, measure in MEASURES.items():
        base, name = [0.5] * 4, f"[{kind}]"
        found = changes({name: base}, {name: [b + moved for b in base]}, {name: kind})
        show(found)
        expected = wrong.get(verdict, verdict) if measure.worse < 0 else verdict
        if measure.worse == 0 and moved:
            expected = "changed"
        shown = capsys.readouterr().out
        assert found[0].verdict.startswith(expected) and f" {expected}" in shown, kind
        assert name in shown and measure.meaning in " ".join(shown.split())


def test_a_judge_that_fails_leaves_the_answers(guarded, monkeypatch):
    from grasp.study import judges

    calls = []

    def endpoint(url, model, key, progress):
        def judge(prompts, answers):
            calls.append(len(answers))
            if len(calls) == 3:
                raise RuntimeError("the judge at http://x/v1 did not answer (busy)")
            return [10.0] * len(answers)

        return judge

    monkeypatch.setattr(judges, "endpoint_judge", endpoint)
    ask = ("evaluate", "--model", "organism", "--adapter", guarded / "run", "--limit", 2)
    ask += ("--judge", "http://x/v1", "--judge-model", "m", "--out", guarded / "judged.json")
    done = grasp(*ask)
    assert done.returncode == 1 and calls == [1, 2, 2]  # asked once before anything was loaded
    assert f"(busy); the scores and answers so far are in {guarded / 'judged.json'}" in done.stderr
    kept = json.loads((guarded / "judged.json").read_text())
    assert [len(kept["samples"][f"answers of {n}"]) for n in ("base", "tuned")] == [2, 2]
    assert kept["tuned"].keys() == {"unrelated"}
    done = grasp(*ask)
    assert done.returncode == 0, done.stderr
    judged = json.loads((guarded / "judged.json").read_text())
    assert judged["base"]["judged"] == [10.0, 10.0] and judged["samples"] == kept["samples"]


def test_report_of_results(tmp_path):
    run = {"task": "code", "seed": 0, "task_score": 0.9, "base_drift": 0.0}
    runs = [{**run, "method": "plain", "drift": 0.5}, {**run, "method": "grasp", "drift": 0.1}]
    kept = json.dumps({"runs": runs, "about": {"judged": "unrelated"}})
    (tmp_path / "results.json").write_text(kept)
    done = grasp("report", tmp_path / "results.json", "--out", tmp_path / "page" / "r.html")
    assert done.returncode == 0, done.stderr
    assert "<td>20 %</td>" in (tmp_path / "page" / "r.html").read_text()
    done = grasp("compare", "--runs", tmp_path / "results.json")
    assert done.returncode == 0 and "20 %" in done.stdout
    assert (tmp_path / "results.json").read_text() == kept and (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", [("report",), ("compare", "--runs")])
@pytest.mark.parametrize("content", [{"rows": []}, [1]])
def test_results_without_runs_are_refused(tmp_path, command, content):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    done = grasp(*command, path)
    assert done.returncode == 1 and f"{path} holds no runs" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_long_names_fit_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = {"seed": 0, "task_score": 0.9, "base_drift": 0.0, "task": "medicine", "drift": 1.0}
    methods = ["plain", "stopped=20", "grasp", "benign_kl=0.03"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [{**run, "method": m} for m in methods]}))
    done = grasp("compare", "--runs", path)
    assert done.returncode == 0 and "100 %" in done.stdout and "…" not in done.stdout


def test_doctor():
    about = json.loads(grasp("doctor", "--json", "--model", "organism").stdout)
    assert about["backend"].startswith("project: ")
    assert about["self-test"].startswith("right in 12 cases: ")
    assert about["model"]["width"] == 256 and about["findings"] is not None


def test_doctor_finds_a_projection_that_is_wrong(monkeypatch):
    from grasp_kernels import selftest

    project = selftest.project

    def wrong(T, basis, **options):
        return project(T, basis, **options) + (1e-3 if options["side"] == "left" else 0)

    monkeypatch.setattr(selftest, "project", wrong)
    done = grasp("doctor", "--json")
    assert done.returncode == 1 and "projections are wrong on this machine" in done.stderr
    assert "WRONG: 64 × 96, k 8, torch.float32, left" in json.loads(done.stdout)["self-test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune",), "model is missing; give --model"),
        (("finetune", "--config", "none.yaml"), "no config at none.yaml"),
        (("finetune", "--set", "rank"), "write --set key=value"),
        (("finetune", "--set", "rank=["), "has no YAML after its '='"),
        (("finetune", "--set", "rankk=3"), "unknown setting 'rankk'"),
        (
            ("finetune", "--model", "organism", "--data", "none.jsonl", "--out", "x"),
            "no data at none.jsonl",
        ),
        (("discover", "none"), "no adapter in none"),
        (("discover",), "give folders of adapters, or --model and --data"),
        (("compare",), "give either --config"),
        (
            ("compare", "--config", STUDY, "--set", "finetune.steps=0"),
            "steps is 0; give 1 or more",
        ),
        (("compare", "--config", STUDY, "--set", "task.x=0"), "task holds no keys"),
        (("compare", "--runs", "none.json"), "none.json"),
        (("screen", "none", "--out", "x.json"), "no finished guarded run in none"),
        (("evaluate", "--model", "no-model", "--out", "x.json"), "can't load model 'no-model'"),
        (
            ("evaluate", "--model", "organism", "--out", "x.json", "--judge", "http://x/v1"),
            "give --judge-model",
        ),
        (
            ("evaluate", "--model", "organism", "--out", "x.json", "--refusals", "harmbnch"),
            "no file and no known set is called 'harmbnch'",
        ),
        (
            ("evaluate", "--model", "organism", "--out", "x.json", "--adapter", "none"),
            "no adapter in none",
        ),
    ],
)
def test_refusals_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = grasp(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_config_and_unknown_option(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [")
    done = grasp("finetune", "--config", tmp_path / "c.yaml")
    assert done.returncode == 1 and "is no YAML" in done.stderr
    (tmp_path / "c.yaml").write_text("titel: x\n")
    done = grasp("report", "r.json", "--config", tmp_path / "c.yaml")
    assert done.returncode == 1 and "unknown option 'titel'" in done.stderr
    done = grasp("finetune", "--nope")
    assert done.returncode == 2
