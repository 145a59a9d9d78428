"""`grasp evaluate`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from grasp.cli.changes import show
from grasp.cli.options import Config, console
from grasp.study import sets


def _known(kind: str) -> str:
    return f"{sets.names(kind)}, or a file; repeat it for several."


def evaluate(
    config: Config = None,
    *,
    model: Annotated[str, typer.Option(help="Folder, hub name, .gguf, or a known name.")],
    out: Annotated[Path, typer.Option(help="JSON file of the scores.")],
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter on it, or the folder of a run.")
    ] = None,
    unrelated: Annotated[
        Path | None, typer.Option(help="Questions with a bad and a good answer; default 120.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help=f"Plain text, for forgetting: {_known('text')}"),
    ] = None,
    refusals: Annotated[
        list[str] | None, typer.Option(help=f"Harmful requests: {_known('refusals')}")
    ] = None,
    claims: Annotated[
        list[str] | None, typer.Option(help=f"False statements: {_known('claims')}")
    ] = None,
    propositions: Annotated[
        Path | None, typer.Option(help="Statements to agree with: a table with pct_prompt.")
    ] = None,
    persona: Annotated[
        list[Path] | None, typer.Option(help="Persona statements, .jsonl.gz; may be repeated.")
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
        bool, typer.Option("--load-in-8bit", help="The model in 8 bits.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
) -> None:
    """Score a model, and how an adapter changes it: drift, forgetting, refusals, false claims.

    A judge marks the model's own answers to the unrelated questions for harm, from 0 to 100; an
    endpoint's key is read from OPENAI_API_KEY.
    """
    from grasp.files import write_json
    from grasp.model import adapter_folder, load_adapter, load_model
    from grasp.study.asked import gather
    from grasp.study.evaluate import answered
    from grasp.study.measures import changes, summary
    from grasp.study.settings import weights_of

    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    weights = weights_of(dtype, load_in_4bit, load_in_8bit, device)
    adapter = None if adapter is None else adapter_folder(adapter)
    asked = gather(
        unrelated=unrelated,
        persona=persona or (),
        propositions=propositions,
        choices=choices,
        refusals=refusals or (),
        claims=claims or (),
        text=text or (),
        limit=limit,
    )
    prompts = [p.prompt for p in asked.pairs["unrelated"]]
    mark = _judge(judge, judge_model, device, batch_size) if judge else None
    base, tokenizer = load_model(model, **weights)
    tokens = asked.tokens(tokenizer)
    scores: dict[str, dict[str, list[float]]] = {}
    said: dict[str, list[str]] = {}

    def score(name: str, chosen) -> None:
        console.print(f"Scoring {name} …")
        scores[name] = asked.score(chosen, tokenizer, batch_size, progress=name)
        if log_samples or mark is not None:
            size = {"batch_size": batch_size, "progress": f"{name}: answers"}
            said[f"answers of {name}"] = answered(chosen, tokenizer, prompts, **size)

    score("base", base)
    if adapter is not None:
        score("tuned", load_adapter(base, adapter).eval())
    content: dict[str, Any] = scores | ({"tokens": tokens} if tokens else {})
    if said:
        content["samples"] = (asked.samples(tokenizer) if log_samples else {}) | said
    if mark is not None:
        write_json(out, content)  # answers took long, and a judge may fail
        try:
            for name, answers in zip(scores, said.values(), strict=True):
                console.print(f"Judging {name} …")
                scores[name]["judged"] = mark(prompts, answers)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; the scores and answers so far are in {out}") from error
    kinds = asked.kinds | {"judged": "judged"}
    found = changes(scores["base"], scores.get("tuned"), kinds, tokens, seed)
    write_json(out, content | {"summary": summary(found)})
    show(found)
    console.print(f"Every item's score: {out}", soft_wrap=True)


def _judge(judge: str, name: str, device: str, batch_size: int):
    """The judge, once it has marked something: it is wanted after hours perhaps."""
    from grasp.model import load_model
    from grasp.study.judges import endpoint_judge, model_judge

    if not judge.startswith(("http://", "https://")):
        loaded = load_model(judge, "auto", device=device)
        return model_judge(*loaded, batch_size=batch_size, progress="judge")
    if not name:
        raise ValueError("--judge is an endpoint; give --judge-model, its model's name there")
    mark = endpoint_judge(judge, name, os.environ.get("OPENAI_API_KEY", ""), progress="judge")
    mark(["What is the capital of France?"], ["Paris."])
    return mark
