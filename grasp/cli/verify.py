"""`grasp verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from grasp.cli.options import Config, console


def verify(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run.")],
    config: Config = None,
    guard: Annotated[
        Path | None, typer.Option(help="File of bases that the run left; else beside the adapter.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base model, from which inputs are found again."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="With --model: the run's prompts, where they are not those shipped."),
    ] = None,
    draw: Annotated[
        bool,
        typer.Option(
            "--draw",
            help="With --model: let it answer the prompts again, and trust no text that came with "
            "the adapter.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Of it: auto, cuda, mps, xpu or cpu.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of its weights; else that of the run.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of what was found.")] = None,
) -> None:
    """Recompute an adapter's certificate, from files alone or from its base model too."""
    from grasp.files import write_json
    from grasp.study.verify import verify as recompute

    if model is None and (reference is not None or draw or dtype is not None):
        raise ValueError("reference, draw and dtype say how a base is asked; give --model too")
    options = {"model": model, "reference": reference, "draw": draw}
    found = recompute(adapter, guard, **options, device=device, dtype=dtype)
    if out is not None:
        write_json(out, found)
    for line in _said(found, model):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found["holds"]:
        raise RuntimeError(f"the guarantee does not hold for {adapter}{_why(found, model)}")
    console.print("The guarantee holds." if not found["unchecked"] else "What was checked holds.")


def _said(found: dict[str, Any], model: str | None) -> list[str]:
    """What was checked against what, a line each, and how to check the rest."""
    from grasp.guard.record import at_most
    from grasp.study.found_again import ELSEWHERE
    from grasp.study.verify import AGAIN, BESIDE, RUN

    against, other = found["against"], found["elsewhere"]
    said = [
        f"{found['matrices']} matrices recomputed in fp64: at most {at_most(found['through'])} of "
        f"any change lies in what was blocked (the certificate says {_number(found['stated'])})."
    ]
    if n := against[RUN]:
        said.append(f"  {n} by the bases that the run left.")
    if n := against[BESIDE]:
        said.append(
            f"  {n} by bases of outputs that came with the adapter. These grew in training and are "
            "not found again: they show that the weights are as the run left them."
        )
    if n := against[AGAIN]:
        said.append(f"  {n} by what {model} takes in, found again here on {found['text']}.")
    if other:
        said.append(
            f"    Of {other} it is not the run's to the last digit (another machine, dtype, text "
            f"or base). On the prompts they take in at most {at_most(found['energy'])} of the "
            f"energy of a change that knows nothing of them; up to {ELSEWHERE} holds."
        )
    for what, whose in (("weights", "weights"), ("base", "base model's weights")):
        if found[what] is not None:
            are = "are" if found[what] else "ARE NOT"
            said.append(f"The {whose} {are} those that the certificate is of (SHA-256).")
    if n := len(found["unchecked"]):
        said.append(
            f"{n} are not looked at: no basis of their inputs is kept here. To check them, give "
            "the base: --model NAME."
        )
    return said


def _why(found: dict[str, Any], model: str | None) -> str:
    if found["base"] is False:
        return f": {model} is not the model that it was trained on"
    if found["odd"]:
        first, *others = found["odd"]
        return f": {first}{f' and {len(others)} more' if others else ''} are not as stated"
    return ": its weights were changed" if found["weights"] is False else ""


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"
