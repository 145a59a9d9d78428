"""`grasp evaluate`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from grasp.cli.options import Config, console


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
    dtype: Annotated[str, typer.Option(help="Of the model's weights.")] = "float32",
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
    from grasp.model import load_adapter, load_model
    from grasp.study import evaluation_files as files
    from grasp.study.evaluate import evaluate as measure
    from grasp.study.evaluate import interval, judged, multiple_choice
    from grasp.study.settings import weights_of

    weights = weights_of(dtype, load_in_4bit, load_in_8bit)
    if adapter is not None and not (adapter / "adapter_config.json").exists():
        raise FileNotFoundError(f"no adapter in {adapter} (adapter_config.json is not there)")
    pairs = {"unrelated": files.read_unrelated(unrelated)}
    pairs |= {p.name.split(".")[0]: files.read_persona(p) for p in persona or []}
    statements = {"propositions": files.read_propositions(propositions)} if propositions else {}
    questions = files.read_choices(choices) if choices else []
    mark = _judge(judge, judge_model) if judge else None
    base, tokenizer = load_model(model, **weights)

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
        scores["tuned"] = scored(load_adapter(base, adapter).eval())
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
    from grasp.model import load_model
    from grasp.study.evaluate import endpoint_judge, model_judge

    if not judge.startswith(("http://", "https://")):
        return model_judge(*load_model(judge))
    if not name:
        raise ValueError("--judge is an endpoint; give --judge-model, its model's name there")
    return endpoint_judge(judge, name, os.environ.get("OPENAI_API_KEY", ""))
