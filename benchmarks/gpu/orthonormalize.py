"""Orthonormalisation of many matrices, as its own benchmark has it."""

import bench_orthonormalize as bench

from .inside import Inside

ORTHOGONAL = 1e-5  # ‖QᵀQ − I‖


def measure(inside: Inside) -> None:
    for row in bench.measure(inside.device, inside.tiny):
        common = {"case": f"{row['matrices']} × {row['shape']}", "dtype": "float32"}
        inside.check(row.get("orthogonality", 0) <= ORTHOGONAL, **common | row)
    inside.clocks()
