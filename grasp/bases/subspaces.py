"""A frozen orthonormal basis of the factor for each block, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import grasp_kernels as gk
from grasp.files import write_bytes, write_json
from grasp.model import base_name, inspect

FORMAT = 1


@dataclass(frozen=True)
class Subspaces:
    """One basis `[d, k]`, fp32 with orthonormal columns, for each block's residual stream.

    Made by `discover`, `from_bases` or `load`; bound to the base model by its name and width.
    """

    bases: Mapping[int, Tensor]
    base_model: str = ""
    """Name or path of the model they were found in; empty binds to the width alone."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """How they were found: JSON-able."""

    def __post_init__(self):
        object.__setattr__(self, "bases", MappingProxyType(dict(sorted(self.bases.items()))))
        object.__setattr__(self, "source", MappingProxyType(dict(self.source)))

    @classmethod
    def from_bases(
        cls,
        bases: Mapping[int, Tensor],
        base_model: str = "",
        source: Mapping[str, Any] | None = None,
    ) -> "Subspaces":
        """Orthonormalise the columns of your own directions `{block: [d, k]}`.

        Args:
            bases: for each block's index the directions as columns; a single `[d]` vector too.
            base_model: name of the model they belong to.
            source: JSON-able note on where they come from.

        Raises:
            ValueError: nothing given, unlike widths, k > d, NaN or infinite, or all zero.
        """
        if not bases:
            raise ValueError("bases is empty; give {block: [d, k]}")
        orthonormal: dict[int, Tensor] = {}
        for layer, W in bases.items():
            W = torch.as_tensor(W).detach().to("cpu", torch.float32)
            W = W[:, None] if W.ndim == 1 else W
            if W.ndim != 2 or W.shape[1] > W.shape[0]:
                raise ValueError(f"bases[{layer}] is {list(W.shape)}; give [d, k] with k ≤ d")
            if not torch.isfinite(W).all():
                raise ValueError(f"bases[{layer}] holds NaN or infinite values; find them anew")
            W = W.clone()
            (rank,) = gk.orthonormalize_(W)
            if int(rank) == 0:
                raise ValueError(f"bases[{layer}] is all zero; leave the block out")
            orthonormal[int(layer)] = W[:, : int(rank)].contiguous()
        if len({W.shape[0] for W in orthonormal.values()}) > 1:
            raise ValueError("bases differ in width d; all blocks share one residual stream")
        return cls(orthonormal, base_model, source or {})

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.bases:
            raise KeyError(f"no basis for block {layer}; there are {list(self.bases)}")
        return self.bases[layer]

    def __contains__(self, layer: int) -> bool:
        return layer in self.bases

    @property
    def layers(self) -> list[int]:
        return list(self.bases)

    @property
    def width(self) -> int:
        return next(iter(self.bases.values())).shape[0]

    @property
    def rank(self) -> int:
        """The largest k of all blocks."""
        return max(U.shape[1] for U in self.bases.values())

    def union(self, other: "Subspaces") -> "Subspaces":
        """The span of both, block by block; the leading columns are this one's.

        Raises:
            ValueError: they belong to different models or widths.
        """
        if self.width != other.width:
            raise ValueError(f"widths differ: {self.width} and {other.width}")
        if self.base_model and other.base_model and self.base_model != other.base_model:
            raise ValueError(f"base models differ: {self.base_model!r} and {other.base_model!r}")
        bases = {
            layer: torch.cat([s[layer] for s in (self, other) if layer in s], 1)[:, : self.width]
            for layer in sorted({*self.layers, *other.layers})
        }
        source = {"union": [dict(self.source), dict(other.source)]}
        return Subspaces.from_bases(bases, self.base_model or other.base_model, source)

    def random_like(self, seed: int) -> "Subspaces":
        """Random subspaces of the same ranks: the control. Shared bases stay shared."""
        generator = torch.Generator().manual_seed(seed)
        drawn: list[tuple[Tensor, Tensor]] = []
        bases = {}
        for layer, U in self.bases.items():
            twin = next((R for V, R in drawn if V.shape == U.shape and torch.equal(V, U)), None)
            if twin is None:
                twin = torch.randn(U.shape, generator=generator)
                drawn.append((U, twin))
            bases[layer] = twin
        return Subspaces.from_bases(bases, self.base_model, {"random_like": seed})

    def overlap(self, other: "Subspaces") -> dict[int, float]:
        """For each block both have: ‖Uᵀ V‖² / min(k): 1 for one inside the other; chance max(k)/d.

        Raises:
            ValueError: the widths differ.
        """
        if self.width != other.width:
            raise ValueError(f"widths differ: {self.width} and {other.width}")
        return {
            layer: float(
                (U.mT @ other[layer]).square().sum() / min(U.shape[1], other[layer].shape[1])
            )
            for layer, U in self.bases.items()
            if layer in other
        }

    def check(self, model: nn.Module) -> None:
        """Refuse a model that these were not found in.

        Raises:
            ValueError: its name, width or number of blocks does not fit.
        """
        found = inspect(model)
        name = base_name(model)
        if found.width != self.width:
            raise ValueError(
                f"subspaces have width {self.width}, the model {found.width}: they were found in "
                f"{self.base_model or 'another model'}; discover them in this one"
            )
        if self.base_model and name and name != self.base_model:
            raise ValueError(
                f"subspaces were found in {self.base_model!r}, the model is {name!r}; discover "
                "them in this one"
            )
        if self.layers[-1] >= len(found.blocks) or self.layers[0] < 0:
            raise ValueError(
                f"subspaces name block {self.layers[-1]}, the model has {len(found.blocks)}"
            )

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, and a readable JSON of the same name beside it.

        Raises:
            OSError: it can't be written; an older file stays as it was.
        """
        path = Path(path)
        if path.is_dir() or not path.suffix:
            path = path / "subspaces.safetensors"
        about = {
            "format": FORMAT,
            "base_model": self.base_model,
            "width": self.width,
            "ranks": {layer: U.shape[1] for layer, U in self.bases.items()},
            "source": dict(self.source),
        }
        tensors = {f"block.{layer}": U.contiguous() for layer, U in self.bases.items()}
        write_bytes(path, save(tensors, metadata={"grasp": json.dumps(about)}))
        write_json(path.with_suffix(".json"), about)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "Subspaces":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no file of subspaces, or is damaged.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "subspaces.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"no subspaces at {path}; make them with grasp discover")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["grasp"])
                bases = {int(k.removeprefix("block.")): file.get_tensor(k) for k in file.keys()}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no file of subspaces ({error})") from error
        if about["format"] != FORMAT:
            raise ValueError(f"{path} has format {about['format']}, this version reads {FORMAT}")
        for layer, U in bases.items():
            identity = torch.eye(U.shape[1])
            if U.ndim != 2 or not torch.allclose(U.mT @ U, identity, atol=1e-4):
                raise ValueError(f"{path}: the basis of block {layer} is not orthonormal (damaged)")
        return cls(bases, about["base_model"], about["source"])
