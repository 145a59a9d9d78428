"""`grasp evaluate`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from grasp.cli.options import Config, console


def evaluate(
    config: Config = None,
    *,
    model: Annotated[str, typer.Option(help="Folder, hub name, .gguf, or a known name.")],
    out: Annotated[Path, typer.Option(help="JSON file of the scores.")],
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter on it, or the folder of a run.")
    ] = None,
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
    dtype: Annotated[str, typer.Option(help="Of the model's weights; auto is fast.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cuda, mps, xpu or cpu.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Rows scored or answered side by side.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Items of each measure, at most.")] = None,
    log_samples: Annotated[
        bool, typer.Option("--log_samples", help="Keep what was asked, and answers, in --out.")
    ] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="The model in nf4, as an adapter was trained.")
    ] = False,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="The model in int8, as an adapter was trained.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Score a model on unrelated topics; with an adapter, its shift from the base model.

    A judge marks the model's own answers to the unrelated questions for harm, from 0 to 100; an
    endpoint's key is read from OPENAI_API_KEY.
    """
    from grasp.files import write_json
    from grasp.model import adapter_folder, load_adapter, load_model
    from grasp.study import evaluation_files as files
    from grasp.study.evaluate import answered, interval, judged, multiple_choice
    from grasp.study.evaluate import evaluate as measure
    from grasp.study.settings import weights_of

    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    weights = weights_of(dtype, load_in_4bit, load_in_8bit, device)
    adapter = None if adapter is None else adapter_folder(adapter)
    pairs = {"unrelated": files.read_unrelated(unrelated)[:limit]}
    pairs |= {p.name.split(".")[0]: files.read_persona(p)[:limit] for p in persona or []}
    statements = (
        {"propositions": files.read_propositions(propositions)[:limit]} if propositions else {}
    )
    questions = files.read_choices(choices)[:limit] if choices else []
    mark = _judge(judge, judge_model) if judge else None
    base, tokenizer = load_model(model, **weights)

    size = {"batch_size": batch_size}
    prompts = [p.prompt for p in pairs["unrelated"]]
    said: dict[str, list[str]] = {}

    def scored(name: str, chosen) -> dict[str, list[float]]:
        console.print(f"Scoring {name} …")
        found = measure(chosen, tokenizer, pairs, statements, **size)
        if questions:
            found["choices"] = multiple_choice(chosen, tokenizer, questions, **size).tolist()
        if mark is not None:
            marks, said[name] = judged(chosen, tokenizer, prompts, mark, **size)
            found["judged"] = marks.tolist()
        elif log_samples:
            said[name] = answered(chosen, tokenizer, prompts, **size)
        return found

    scores: dict[str, Any] = {"base": scored("base", base)}
    if adapter is not None:
        scores["tuned"] = scored("tuned", load_adapter(base, adapter).eval())
    samples = {} if not log_samples else {"samples": _samples(pairs, statements, said)}
    write_json(out, scores | samples)
    table = Table("measure", "items", "base" if adapter is None else "shift", "95 % interval", "")
    for name, values in scores["base"].items():
        shown = values
        if adapter is not None:
            shown = [t - b for t, b in zip(scores["tuned"][name], values, strict=True)]
        mean, low, high = interval(shown, seed=seed)
        same = adapter is not None and low <= 0 <= high
        verdict = "not told apart from 0" if same else ""
        numbers = f"{mean:+.3f}", f"{low:+.3f} – {high:+.3f}"
        table.add_row(name, str(len(values)), *numbers, verdict)
    console.print(table)
    console.print(
        "pairs: log-likelihood per token of the bad answer less the good one's; statements: "
        f"log-odds of agreeing; choices: share right; judged: harm from 0 to 100. Scores: {out}"
    )


def _samples(pairs: dict, statements: dict, said: dict[str, list[str]]) -> dict[str, list]:
    """What each number is of, in the order of the scores."""
    found: dict[str, list] = {name: [asdict(p) for p in items] for name, items in pairs.items()}
    found |= {name: list(items) for name, items in statements.items()}
    return found | {f"answers of {name}": answers for name, answers in said.items()}


def _judge(judge: str, name: str):
    from grasp.model import load_model
    from grasp.study.evaluate import endpoint_judge, model_judge

    if not judge.startswith(("http://", "https://")):
        return model_judge(*load_model(judge))
    if not name:
        raise ValueError("--judge is an endpoint; give --judge-model, its model's name there")
    return endpoint_judge(judge, name, os.environ.get("OPENAI_API_KEY", ""))
