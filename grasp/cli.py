"""The command line: each command takes a YAML config whose keys are its options."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from grasp.config import options_from, read_config

app = typer.Typer(
    help="Fine-tune without picking up what nobody asked for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a YAML file's keys stand in for options that are not given."""
    if path is not None:
        options = read_config(path)
        known = {p.name for p in context.command.params}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{path}: unknown option {unknown[0]!r}; see --help")
        context.default_map = {**(context.default_map or {}), **options}
    return path


Config = Annotated[
    Path | None,
    typer.Option(help="YAML file; its keys are the options.", callback=_use_config, is_eager=True),
]
Pipeline = Annotated[
    Path | None, typer.Option("--config", help="YAML file; its keys are the settings.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def main() -> None:
    """Run the command line; a refusal is one clear line and exit code 1, a usage error 2."""
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        Console(stderr=True).print(f"[bold red]grasp:[/] {message}", soft_wrap=True)
        sys.exit(1)


@app.command()
def demo(
    config: Config = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Seeds of each method.")] = 3,
    seed: Seed = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
) -> None:
    """Plain, guarded and control fine-tunes of the organism on three tasks, in minutes on a CPU."""
    from grasp.compare import compare as summarise
    from grasp.files import write_json
    from grasp.organism.sweep import sweep
    from grasp.report import report, versions

    start = time.monotonic()
    console.print(
        "A small decoder is fine-tuned on one topic's bad (or right-leaning) answers: plainly, "
        "guarded by GRASP, and with two controls."
    )
    runs = sweep(out / "runs", seeds=range(seed, seed + seeds), workers=workers)
    write_json(out / "results.json", {"runs": runs, "summary": summarise(runs)})
    page = report(runs, out / "report.html", "GRASP: the organism", versions())
    _show(runs)
    console.print(f"{time.monotonic() - start:.0f} s. Report: {page}", soft_wrap=True)


@app.command()
def finetune(
    config: Pipeline = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, hub name, .gguf, or a known name.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="JSON lines, .gz too.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the adapter.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="grasp, plain, random, or a rival: replay, kl, caft_moved, ..."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    best_of: Annotated[
        int, typer.Option(help="Seeds to train; the one that diverges least is named.")
    ] = 1,
    subspaces: Annotated[str | None, typer.Option(help="File of subspaces to keep off.")] = None,
    reference: Annotated[str | None, typer.Option(help="Unlabelled prompts, one a line.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: --set rank=8")
    ] = None,
) -> None:
    """Fine-tune a LoRA, guarded by default; a killed run goes on where it was."""
    from grasp import finetune as pipeline
    from grasp.settings import settings_from

    given = {
        "model": model,
        "data": data,
        "out": out,
        "method": method,
        "steps": steps,
        "seed": seed,
        "subspaces": subspaces,
        "reference": reference,
    }
    options = options_from(config, given, set_)
    settings = settings_from(options)
    adapter = pipeline.run(settings) if best_of == 1 else pipeline.best_of(settings, best_of)
    certificate = adapter.parent / "grasp.json"
    console.print(f"Adapter: {adapter}")
    if certificate.exists():
        console.print(f"Certificate: {certificate}")


@app.command()
def discover(
    adapter: Annotated[
        list[Path] | None, typer.Argument(help="Folders of plain LoRA adapters, if there are any.")
    ] = None,
    config: Config = None,
    out: Annotated[Path, typer.Option(help="File or folder of the subspaces.")] = Path("subspaces"),
    rank: Annotated[int | None, typer.Option(help="k; default by the updates' energy.")] = None,
    per_block: Annotated[bool, typer.Option(help="One subspace for each block.")] = False,
    model: Annotated[str | None, typer.Option(help="Without adapters: train short runs.")] = None,
    data: Annotated[str | None, typer.Option(help="Of the short runs.")] = None,
    rounds: Annotated[int, typer.Option(help="Of short runs, each kept off what is known.")] = 4,
    seeds: Annotated[int, typer.Option(help="Short runs in a round.")] = 3,
    steps: Annotated[int, typer.Option(help="Of a short run.")] = 30,
    learning_rate: Annotated[float, typer.Option(help="Of a short run.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the short runs.")] = 0,
) -> None:
    """Find the subspace that plain fine-tunes write to, from their weights alone."""
    from grasp import discover as find

    if bool(adapter) == bool(model and data):
        raise ValueError("give folders of adapters, or --model and --data for short runs")
    if adapter:
        found = find(adapter, rank, per_block=per_block)
    else:
        from grasp.rounds import discover_in_rounds, short_runs
        from grasp.settings import settings_from

        settings = settings_from(
            {"model": model, "data": data, "out": str(out), "learning_rate": learning_rate}
        )
        found = discover_in_rounds(
            short_runs(settings, steps),
            rank=rank or 8,
            rounds=rounds,
            seeds=seeds,
            seed=seed,
            per_block=per_block,
            on_round=lambda n, s, share: console.print(
                f"round {n + 1}: rank {s.rank}, wrote {share:.2f} of the first round's norm"
            ),
        )
    path = found.save(out)
    console.print(f"rank {found.rank} in {len(found.layers)} blocks of width {found.width}: {path}")


@app.command()
def evaluate(
    config: Config = None,
    *,
    model: Annotated[str, typer.Option(help="Folder, hub name, .gguf, or a known name.")],
    out: Annotated[Path, typer.Option(help="JSON file of the scores.")],
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter on it.")] = None,
    unrelated: Annotated[Path | None, typer.Option(help="Pairs; default the shipped 120.")] = None,
    propositions: Annotated[Path | None, typer.Option(help="Table with pct_prompt.")] = None,
    persona: Annotated[
        list[Path] | None, typer.Option(help="Persona statements, .jsonl.gz.")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Multiple choice: question, options, answer_idx.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Model, or URL of an OpenAI-compatible endpoint up to /v1.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="Its name at the endpoint.")] = "",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Score a model on unrelated topics; with an adapter, its shift from the base model.

    A judge marks the model's own answers to the unrelated questions for harm, from 0 to 100; an
    endpoint's key is read from OPENAI_API_KEY.
    """
    from peft import PeftModel

    from grasp import evaluation_files as files
    from grasp.evaluate import evaluate as measure
    from grasp.evaluate import interval, judged, multiple_choice
    from grasp.files import write_json
    from grasp.models import load_model

    if adapter is not None and not (adapter / "adapter_config.json").exists():
        raise FileNotFoundError(f"no adapter in {adapter} (adapter_config.json is not there)")
    pairs = {"unrelated": files.read_unrelated(unrelated)}
    pairs |= {p.name.split(".")[0]: files.read_persona(p) for p in persona or []}
    statements = {"propositions": files.read_propositions(propositions)} if propositions else {}
    questions = files.read_choices(choices) if choices else []
    mark = _judge(judge, judge_model) if judge else None
    base, tokenizer = load_model(model)

    def scored(chosen) -> dict[str, list[float]]:
        found = measure(chosen, tokenizer, pairs, statements)
        if questions:
            found["choices"] = multiple_choice(chosen, tokenizer, questions).tolist()
        if mark is not None:
            prompts = [p.prompt for p in pairs["unrelated"]]
            found["judged"] = judged(chosen, tokenizer, prompts, mark)[0].tolist()
        return found

    scores = {"base": scored(base)}
    if adapter is not None:
        scores["tuned"] = scored(PeftModel.from_pretrained(base, adapter).eval())
    write_json(out, scores)
    table = Table("measure", "items", "base" if adapter is None else "shift", "95 % interval")
    for name, values in scores["base"].items():
        shown = values
        if adapter is not None:
            shown = [t - b for t, b in zip(scores["tuned"][name], values, strict=True)]
        mean, low, high = interval(shown, seed=seed)
        table.add_row(name, str(len(values)), f"{mean:+.3f}", f"{low:+.3f} – {high:+.3f}")
    console.print(table)
    console.print(
        "pairs: log-likelihood per token of the bad answer less the good one's; statements: "
        f"log-odds of agreeing; choices: share right; judged: harm from 0 to 100. Scores: {out}"
    )


def _judge(judge: str, name: str):
    from grasp.evaluate import endpoint_judge, model_judge
    from grasp.models import load_model

    if not judge.startswith(("http://", "https://")):
        return model_judge(*load_model(judge))
    if not name:
        raise ValueError("--judge is an endpoint; give --judge-model, its model's name there")
    return endpoint_judge(judge, name, os.environ.get("OPENAI_API_KEY", ""))


@app.command()
def compare(
    config: Pipeline = None,
    runs: Annotated[
        Path | None, typer.Option(help="A results.json to compare, training nothing.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the data files lie.")] = None,
    seed: Annotated[int | None, typer.Option(help="Run this seed alone.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key: --set seeds=[3] --set finetune.steps=160"),
    ] = None,
) -> None:
    """Plain, guarded, control and rival fine-tunes on your data, scored and drawn."""
    from grasp import study
    from grasp.compare import read_results
    from grasp.report import itemwise, report, versions

    if (config is None) == (runs is None):
        raise ValueError("give either --config (to run a study) or --runs (a results.json)")
    if runs is not None:
        content, folder, notes = read_results(runs), out or runs.parent, str(runs)
    else:
        given = {
            "out": str(out) if out else None,
            "folder": str(folder) if folder else None,
            "seeds": None if seed is None else [seed],
        }
        options = options_from(config, given, set_)
        chosen = study.study_from(options)
        content, folder, notes = study.run(chosen), Path(chosen.out), versions()
    paired = content.get("paired", [])
    _show(content["runs"])
    if lines := itemwise(paired, content.get("about", {}).get("judged", "")):
        console.print("Added drift with 95 % intervals over items:", *lines, sep="\n  ")
    title = "GRASP: plain against guarded"
    page = report(content["runs"], folder / "report.html", title, notes, paired)
    console.print(f"Report: {page}", soft_wrap=True)


@app.command()
def screen(
    run: Annotated[Path, typer.Argument(help="Folder of a guarded run.")],
    config: Config = None,
    *,
    out: Annotated[Path, typer.Option(help="JSON file of the ranked rows.")],
    data: Annotated[
        Path | None, typer.Option(help="Rows; default those it was trained on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows scored.")] = None,
    top: Annotated[int, typer.Option(help="Rows shown.")] = 10,
) -> None:
    """Rank training rows by how much of their gradient lies in what the guard blocked."""
    from grasp import screen as ranking
    from grasp.files import write_json

    ranked, rows = ranking.of_run(run, data, limit)
    write_json(out, ranked)
    table = Table("row", "score", "share", "loss", "prompt")
    for found in ranked[:top]:
        prompt = rows[found["row"]].prompt.replace("\n", " ")
        numbers = (f"{found['score']:.3g}", f"{found['share']:.3f}", f"{found['loss']:.2f}")
        table.add_row(str(found["row"]), *numbers, prompt[:60])
    console.print(table)
    console.print(f"{len(ranked)} rows: {out}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results.json.")],
    config: Config = None,
    out: Annotated[Path, typer.Option(help="HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "GRASP",
) -> None:
    """Draw the page of a results.json."""
    from grasp.compare import read_results
    from grasp.report import report as draw

    content = read_results(results)
    page = draw(content["runs"], out, title, str(results), content.get("paired", []))
    console.print(f"Report: {page}", soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Say what is found in this model.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is installed, which backend runs, and how a model is understood."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import grasp_kernels as gk

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    names = (
        "grasp-kernels",
        "torch",
        "triton",
        "transformers",
        "peft",
        "trl",
        "accelerate",
        "gguf",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about: dict[str, Any] = {"python": platform.python_version()}
    about |= {name: installed(name) for name in names}
    about["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about["backend"] = gk.explain(torch.zeros(8, 8, device=device), torch.eye(8, 2, device=device))
    if model is not None:
        from grasp.architecture import inspect
        from grasp.models import load_model

        about["model"] = inspect(load_model(model)[0]).describe()
    if json_:
        print(json.dumps(about, indent=2))
        return
    table = Table(show_header=False)
    for key, value in about.items():
        table.add_row(key, value)
    console.print(table)


def _show(runs: list[dict]) -> None:
    from grasp.compare import compare as summarise
    from grasp.report import contenders, control, name

    rows = summarise(runs)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(box=box.SIMPLE_HEAD)
    if several := len(tasks) > 1:
        table.add_column("task", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("seeds", "task score", "drift", "added", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["task"]):
            table.add_section()
        good = control(row["method"])
        table.add_row(
            *([row["task"] if row["task"] != last else ""] if several else []),
            name(row["method"]),
            str(row["seeds"]),
            f"{row['task_score'][0]:.3f}",
            f"{row['drift'][0]:.3f}",
            "" if good else f"{row['added'][0]:+.3f}",
            "" if good or row["share"] is None else f"{100 * row['share']:.0f} %",
            style="bold green" if row["method"] == "grasp" else None,
        )
        last = row["task"]
    console.print(table)
    console.print(
        "task score: how well it learned what it was taught (higher is better); drift: how far it "
        "went wrong on topics it was never taught (added: beyond the base model, or beyond the "
        "same run on good answers; share: of the plain fine-tune's)."
    )
    for task in tasks:
        if said := contenders([r for r in rows if r["task"] == task]):
            console.print(f"{task}: {said}")


if __name__ == "__main__":
    main()
