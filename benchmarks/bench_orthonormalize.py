"""Orthonormalisation of many tall matrices against a loop of `torch.linalg.qr`, in one run.

python benchmarks/bench_orthonormalize.py [--device cpu|cuda] [--quick]

On a GPU also with every other column as little as 1e-4 from the one before it, which takes a second
pass. `orthogonality` is the largest ‖Qᵀ Q − I‖.
"""

from collections.abc import Iterator
from itertools import product

import torch
from harness import main, timed

import grasp_kernels as gk
from grasp_kernels import dispatch

GPU_SHAPES = [(64, 8192, 16), (64, 8192, 32), (64, 8192, 64), (448, 4096, 8), (1, 16384, 256)]
CPU_SHAPES = [(16, 2048, 16), (64, 576, 8)]


def measure(device: torch.device, quick: bool) -> Iterator[dict]:
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    aparts = (1.0, 1e-4) if device.type == "cuda" else (1.0,)
    for (count, d, k), apart in product(shapes[:2] if quick else shapes, aparts):
        start = [torch.randn(d, k, device=device) for _ in range(count)]
        for W in start if apart < 1 else []:
            W[:, 1::2] = W[:, ::2] + apart * W[:, 1::2]
        Ws = [W.clone() for W in start]
        try:
            backend = dispatch.choose("orthonormalize_", Ws[0])
        except RuntimeError as refused:
            yield {"matrices": count, "shape": [d, k], "refused": str(refused)}
            continue

        def ours(Ws=Ws, start=start):
            torch._foreach_copy_(Ws, start)
            gk.orthonormalize_(Ws)

        runs = {
            "ours": ours,
            "copy": lambda Ws=Ws, start=start: torch._foreach_copy_(Ws, start),
            "qr loop": lambda start=start: [torch.linalg.qr(W).Q for W in start],
        }
        if count > 1:
            stacked = torch.stack(start)
            runs["qr batch"] = lambda stacked=stacked: torch.linalg.qr(stacked).Q
        times = timed(runs, device, 10 if device.type == "cuda" else 5)
        alone = times["ours"] - times["copy"]
        ours()
        Q = torch.stack(Ws).double()
        error = (Q.mT @ Q - torch.eye(k, device=device)).norm(dim=(1, 2)).max()
        yield {
            "matrices": count,
            "shape": [d, k],
            "apart": apart,
            "backend": backend,
            "ms": alone,
            "over": {n: t / alone for n, t in times.items() if n.startswith("qr")},
            "orthogonality": float(error),
        }


if __name__ == "__main__":
    main(__doc__, "orthonormalize", measure)
