"""Which device, which versions: what every later line is of."""

from .inside import Inside, LeftOut


def measure(inside: Inside) -> None:
    import torch

    if inside.kind == "cuda" and not torch.cuda.is_available():
        raise LeftOut("no CUDA device")
    import harness

    found = harness.about(inside.device)
    inside.add(rehearsal=inside.tiny, **found | {"command": "python benchmarks/gpu_check.py"})
