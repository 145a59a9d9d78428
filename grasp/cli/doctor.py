"""`grasp doctor`."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grasp.cli.options import console

NAMES = (
    "grasp-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "gguf",
    "bitsandbytes",
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Map this model: what a guard covers in it, and what that takes."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Mend what is safe: build the CUDA library, remove damaged or unused files, "
            "install packages that are missing or too old. torch is never replaced.",
        ),
    ] = False,
) -> None:
    """Say what is installed and whether it is right, what is wrong and what to do, and map a model.

    A model's weights are not loaded, so that one of any size is mapped anywhere.
    """
    from grasp.study.checkup import checkup, clear_kernels

    about, well = _about()
    if not well and fix:
        about["mended"] = clear_kernels()
        again, well = _about()
        about |= again
    found = None
    if model is not None:
        from grasp.study.model_map import mapped

        found = mapped(model)
    findings = [
        {"what": f.what, "do": f.do, "command": f.command, "note": f.note}
        | {"done": f.mend() if fix and f.mend is not None else None}
        for f in checkup(found)
    ]
    if json_:
        mapping = {} if found is None else {"model": asdict(found)}
        print(json.dumps(about | {"findings": findings} | mapping, indent=2))
    else:
        _show(about, findings)
        if found is not None:
            _show_map(found)
    if not well:
        raise RuntimeError(
            "projections are wrong on this machine: update torch and triton, or train under "
            'grasp_kernels.backend("reference"); please report what stands under self-test'
        )


def _about() -> tuple[dict[str, Any], bool]:
    """What is here, and whether projections are right."""
    import torch

    import grasp_kernels as gk
    from grasp.model.precision import called, device_of, fast_in_bf16
    from grasp.versions import installed
    from grasp_kernels.selftest import self_test

    device = device_of()
    about: dict[str, Any] = {"python": platform.python_version()}
    about |= {name: installed(name) or "not installed" for name in NAMES}
    about["device"] = called(device)
    about["frozen weights"] = "bfloat16" if fast_in_bf16(device.type) else "float32"
    about["backend"] = gk.explain(torch.zeros(8, 8, device=device), torch.eye(8, 2, device=device))
    try:
        return about | {"self-test": self_test(device)}, True
    except AssertionError as error:
        return about | {"self-test": f"WRONG: {error}"}, False


def _show(about: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    table = Table(show_header=False)
    for key, value in about.items():
        table.add_row(key, Text(value))
    console.print(table)
    if not any(not f["note"] for f in findings):
        console.print("Nothing is wrong.")
    for f in findings:
        style = "" if f["note"] else "bold red"
        console.print(Text.assemble(("- ", style), f["what"]))
        for line in _advice(f):
            console.print(Padding(line, (0, 0, 0, 4), expand=False))


def _advice(finding: dict[str, Any]) -> Iterator[Text]:
    if finding["done"]:
        yield Text(finding["done"], style="green")
        return
    yield Text(finding["do"])
    if finding["command"]:
        yield Text(finding["command"], style="bold")


def _show_map(found) -> None:
    """The map of a model, in 80 columns."""
    from grasp.study.checkup import size

    console.print(
        f"\n{found.model}: {found.parameters / 1e9:.3g} billion parameters, {found.blocks} blocks "
        f"of width {found.width}. Read from its configuration; no weights are loaded.",
        markup=False,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, title="A guard covers", title_justify="left")
    for heading, right in (("maps", False), ("role", False), ("number", True), ("shape", True)):
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for k in found.covered:
        table.add_row(k.name, k.role, f"{k.count:,}", f"{k.d_out} × {k.d_in}")
    console.print(table)
    console.print(
        "With prompts all of these are covered. With directions found in weights writers and "
        "indirect writers are: a writer adds to the residual stream, an indirect one reaches it "
        "through a writer; readers steer attention."
    )
    table = Table(box=box.SIMPLE_HEAD, title="What it does not cover", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    for what, why in found.left_out:
        table.add_row(what, why)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="Memory, by the shapes", title_justify="left")
    table.add_column("what")
    table.add_column("takes", justify="right")
    for name, count in found.memory.items():
        table.add_row(_called(name, found.default), size(count))
    console.print(table)


def _called(name: str, default: str) -> str:
    mark = " (the default here)" if name == default else ""
    return {
        "outputs": "guard: bases of outputs",
        "tracked": f"guard: inputs, tracked{mark}",
        "64 free": f"guard: inputs, --free_rank 64{mark}",
        "frozen": "guard: inputs, --freeze_inputs",
    }.get(name, name)
