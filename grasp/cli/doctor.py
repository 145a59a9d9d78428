"""`grasp doctor`."""

import json
import platform
from typing import Annotated, Any

import typer
from rich.table import Table

from grasp.cli.options import console


def doctor(
    model: Annotated[str | None, typer.Option(help="Say what is found in this model.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is installed, which backend runs and whether it is right, how a model is read."""
    import torch

    import grasp_kernels as gk
    from grasp.model.precision import called, device_of, fast_in_bf16
    from grasp.versions import installed
    from grasp_kernels.selftest import self_test

    names = (
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
    device = device_of()
    about: dict[str, Any] = {"python": platform.python_version()}
    about |= {name: installed(name) or "not installed" for name in names}
    about["device"] = called(device)
    about["frozen weights"] = "bfloat16" if fast_in_bf16(device.type) else "float32"
    about["backend"] = gk.explain(torch.zeros(8, 8, device=device), torch.eye(8, 2, device=device))
    try:
        about["self-test"], well = self_test(device), True
    except AssertionError as error:
        about["self-test"], well = f"WRONG: {error}", False
    if model is not None:
        from grasp.model import inspect, load_model

        about["model"] = inspect(load_model(model)[0]).describe()
    if json_:
        print(json.dumps(about, indent=2))
    else:
        table = Table(show_header=False)
        for key, value in about.items():
            table.add_row(key, value)
        console.print(table)
    if not well:
        raise RuntimeError(
            "projections are wrong on this machine: update torch and triton, or train under "
            'grasp_kernels.backend("reference"); please report what stands under self-test'
        )
