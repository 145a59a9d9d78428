"""What a decoder is made of: blocks, their linear maps, and what of them is trained.

A block adds to the residual stream through *writers*: the last linear map of its attention and of
its MLP. A map whose outputs reach the writer's input as they are is a *value* map, one that changes
it some other way is *hidden* (gate, up), one that does not is a *reader* (query, key).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grasp.model.modes import evaluating, given, is_linear, is_quantised
from grasp.model.partitions import shape
from grasp.model.sharding import gathered

PRODUCTS = ("ALora", "Velora", "MiCA")  # of PEFT's variants those that add B A x, if anything
PROBES = 16  # the estimate of a norm is off by its root at most, a quarter


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a block."""

    name: str
    module: nn.Module  # the PEFT wrapper where there is one
    role: str  # writer, value, hidden or reader; other where that can't be told
    writer: "Matrix | None" = None
    """The writer that a value or hidden map feeds."""
    select: Tensor | None = None
    """Value: for each input of the writer, the output of this map that it copies, or -1."""
    scale: Tensor | None = None
    """Writer: the weight [d] of a norm between it and the residual stream, if there is one."""
    taken: Tensor | None = None
    """Of the dtype and on the device of what it takes in, and empty."""
    index: int | None = None
    """Of experts that share one parameter, which."""

    @property
    def takes_in(self) -> str:
        """What tells its input from others': maps side by side share theirs with no writer."""
        beside, _, last = self.name.rpartition(".")
        own = self.role == "writer" or self.index is not None or last.isdigit()
        return self.name if own else beside

    @property
    def base(self) -> nn.Module:
        return getattr(self.module, "base_layer", self.module)

    @property
    def out_features(self) -> int:
        return out_features(self.base)

    @property
    def in_features(self) -> int:
        return in_features(self.base)

    def norm(self) -> float:
        """‖W‖ of the pretrained weight; where it is none, from E ‖Wᵀ z‖² = ‖W‖², z of signs."""
        weight = getattr(self.base, "weight", None)
        if isinstance(weight, Tensor) and not is_quantised(self.base):
            with gathered(self.base):
                return float(self.base.weight.detach().float().norm())
        drawn = torch.rand(self.out_features, PROBES, generator=torch.Generator().manual_seed(0))
        return float(self.back(drawn.round() * 2 - 1).norm()) / PROBES**0.5

    def back(self, vectors: Tensor) -> Tensor:
        """Wᵀ v of the pretrained weight, for the columns of `vectors [d_out, k]`: `[d_in, k]` fp32.

        Through autograd, so that a quantised weight answers too.
        """
        with gathered(self.base):
            x, y = self._run(vectors.shape[1])
            (gradient,) = torch.autograd.grad(y, x, vectors.mT.to(y))
        return gradient.mT.float()

    def passes_gradients(self) -> bool:
        """Whether the pretrained map hands gradients on to what it takes in, if quantised."""
        return not is_quantised(self.base) or self._run(1)[1].requires_grad

    def part(self, factor: Tensor, holds: str) -> Tensor:
        """This map's part of a LoRA's factor that holds "outputs" (B) or "inputs" (A): a view."""
        return factor

    def watch(
        self, hear: Callable[[Tensor, Tensor | None], None], routed: bool = True
    ) -> RemovableHandle:
        """Hear of what it takes in whenever it runs.

        Args:
            hear: called with x `[..., d_in]` and, of an expert, which of the tokens (flattened,
                batch by batch) its rows are of; None says all of them.
            routed: of an expert, the tokens that are routed to it; False takes it to get all.
        """
        return self.module.register_forward_pre_hook(
            lambda module, args, kwargs: hear(given(args, kwargs), None), with_kwargs=True
        )

    def _run(self, rows: int) -> tuple[Tensor, Tensor]:
        with evaluating(self.base), torch.enable_grad():
            x = self.taken.new_zeros(rows, in_features(self.base))
            if not is_quantised(self.base):  # FSDP2 may compute in another dtype than it keeps
                x = x.to(self.base.weight.dtype)
            return x.requires_grad_(), self.base(x)


@dataclass(frozen=True)
class Trained:
    """A parameter that training moves, seen from a matrix's outputs or from its inputs."""

    name: str
    parameter: nn.Parameter
    side: str  # the side of the parameter that a basis multiplies: where what it holds lies
    matrix: Matrix
    holds: str = "outputs"  # or "inputs"
    partner: nn.Parameter | None = None
    """Of a LoRA B the A that it is multiplied with; of the A, the B. One of them may be frozen."""

    @property
    def key(self) -> tuple[int, int | None]:
        """What is one weight: the parameter, or an expert's part of it."""
        return id(self.parameter), self.matrix.index

    @property
    def partner_key(self) -> tuple[int, int | None]:
        return id(self.partner), self.matrix.index

    @property
    def zero_factor(self) -> Tensor | None:
        """Of a LoRA's factors the one that begins at 0, B; None of a weight trained itself."""
        if self.partner is None:
            return None
        B = self.parameter if self.holds == "outputs" else self.partner
        return self.matrix.part(B, "outputs")

    def of(self, T: Tensor) -> Tensor:
        """Of a tensor of the parameter's shape, such as its gradient, what is of this weight."""
        return T if self.partner is None else self.matrix.part(T, self.holds)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter as a whole, wherever its parts lie."""
        if self.matrix.index is not None:
            return self.of(self.parameter.detach()).shape
        return shape(self.parameter)

    @property
    def size(self) -> int:
        """d of a basis for this."""
        return self.shape[0 if self.side == "left" else -1]


@dataclass(frozen=True)
class Block:
    index: int
    name: str
    module: nn.Module
    matrices: tuple[Matrix, ...]

    def of_role(self, *roles: str) -> list[Matrix]:
        return [m for m in self.matrices if m.role in roles]


@dataclass(frozen=True)
class Architecture:
    """The blocks of a decoder and the residual stream's width `d`."""

    model: nn.Module = field(repr=False)
    width: int
    blocks: tuple[Block, ...]
    outside: tuple[Matrix, ...] = ()
    """Linear maps in no block that a LoRA is trained on."""

    def describe(self) -> str:
        """A line for each distinct kind of block: which map plays which part."""
        kinds: dict[str, list[int]] = {}
        for block in self.blocks:
            parts = [
                f"{role}: " + ", ".join(m.name.removeprefix(block.name + ".") for m in maps)
                for role in ("writer", "value", "hidden", "reader", "other")
                if (maps := block.of_role(role))
            ]
            kinds.setdefault(" · ".join(parts), []).append(block.index)
        return "\n".join(
            f"blocks {found[0]}–{found[-1]} ({len(found)}), width {self.width}: {kind}"
            for kind, found in kinds.items()
        )

    def trained(self) -> list[Trained]:
        """Every trainable parameter of the linear maps that acts on their outputs.

        Raises:
            ValueError: an adapter whose update is not B A with B starting at 0 (DoRA).
        """
        matrices = chain(*(block.matrices for block in self.blocks), self.outside)
        return [t for m in matrices for t in _trained(m)]

    def reading(self) -> list[Trained]:
        """The parameters of the same updates that act on the maps' inputs: LoRA A, or a weight."""
        return [_reading(t) for t in self.trained() if len(t.shape) > 1]

    def untracked(self) -> list[str]:
        """Trainable parameters that are neither `trained()` nor the A of a LoRA that is."""
        tracked = {id(p) for t in self.trained() for p in (t.parameter, t.partner)}
        named = self.model.named_parameters()
        return [name for name, p in named if p.requires_grad and id(p) not in tracked]


def base_name(model: nn.Module) -> str:
    """The name or path that the base model was loaded from; empty if it was built here."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "") or ""


def lora_update(matrix: Matrix, adapter: str | None = None) -> tuple[Tensor, Tensor] | None:
    """`(s B, A)` in fp32 of the matrix's LoRA, several adapters side by side; None without one."""
    names = _adapters(matrix.module)
    if adapter is not None:
        names = [n for n in names if n == adapter]
    if not names:
        return None
    layer = matrix.module
    B = [layer.scaling[n] * matrix.part(layer.lora_B[n].weight, "outputs") for n in names]
    A = [matrix.part(layer.lora_A[n].weight, "inputs") for n in names]
    return torch.cat(B, 1).detach().float(), torch.cat(A, 0).detach().float()


def lora_factors(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter, int]]:
    """The name of each LoRA's A, A, B, and of how many experts: those that have a B that trains."""
    return [
        (
            f"{name}.lora_A.{adapter}",
            module.lora_A[adapter].weight,
            B.weight,
            getattr(module, "num_experts", 1),
        )
        for name, module in model.named_modules()
        for adapter, B in getattr(module, "lora_B", {}).items()
        if isinstance(B, nn.Linear) and B.weight.requires_grad
    ]


def out_features(base: nn.Module) -> int:
    return base.nf if type(base).__name__ == "Conv1D" else base.out_features


def in_features(base: nn.Module) -> int:
    return base.nx if type(base).__name__ == "Conv1D" else base.in_features


def _adapters(module: nn.Module) -> list[str]:
    return list(getattr(module, "lora_B", {}))


def _trained(matrix: Matrix) -> Iterator[Trained]:
    module, base = matrix.module, matrix.base
    known = set()
    for adapter in _adapters(module):
        if not hasattr(module.lora_B[adapter], "weight"):
            break
        B, A = module.lora_B[adapter].weight, module.lora_A[adapter].weight
        known |= {id(B), id(A)}
        if not (B.requires_grad or A.requires_grad):
            continue
        _refuse_no_product(matrix, adapter)
        yield Trained(f"{matrix.name}.lora_B.{adapter}", B, "left", matrix, partner=A)
    if not is_linear(base):  # the wrapper of a parameter, which holds others besides
        return
    transposed = type(base).__name__ == "Conv1D"
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    known |= {id(weight), id(bias)}
    for name, p in module.named_parameters():
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"{matrix.name}.{name} is trained by a {type(module).__module__.split('.')[-2]} "
                "adapter, whose update is no product B A; train with LoRA (peft.LoraConfig)"
            )
    if weight is not None and weight.requires_grad:
        side = "right" if transposed else "left"
        yield Trained(f"{matrix.name}.weight", weight, side, matrix)
    if bias is not None and bias.requires_grad:
        yield Trained(f"{matrix.name}.bias", bias, "right", matrix)


def _refuse_no_product(matrix: Matrix, adapter: str) -> None:
    kind = type(getattr(matrix.module, "lora_variant", {}).get(adapter)).__name__
    kind = kind.removesuffix("Variant").removesuffix("Linear")
    if adapter in getattr(matrix.module, "lora_magnitude_vector", {}):
        raise ValueError(
            f"{matrix.name} is trained with DoRA, whose magnitude rescales the pretrained "
            "content along the factor too; train with LoRA (use_dora=False)"
        )
    if getattr(matrix.module.lora_B[adapter], "bias", None) is not None:
        raise ValueError(
            f"{matrix.name} is trained with a bias beside B A, which no basis of inputs holds; "
            "train with LoRA (lora_bias=False)"
        )
    if kind != "NoneType" and kind not in PRODUCTS:
        raise ValueError(
            f"{matrix.name} is trained with {kind}, a LoRA whose update is not known to be a "
            "product B A; train with LoRA (leave that out of LoraConfig)"
        )


def _reading(t: Trained) -> Trained:
    if t.partner is None:
        side = "left" if t.side == "right" else "right"
        return Trained(f"{t.name} (inputs)", t.parameter, side, t.matrix, "inputs")
    name = t.name.replace(".lora_B.", ".lora_A.")
    return Trained(name, t.partner, "right", t.matrix, "inputs", t.parameter)
