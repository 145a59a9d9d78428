"""What a decoder is made of, found by running it: the only file that knows attribute names.

A block adds to the residual stream through *writers*: the last linear map of its attention and of
its MLP. One token is enough to tell the other maps apart, since attention over a single position
hands the value on unchanged: a map whose outputs reach the writer's input as they are is a *value*
map, one that changes it some other way is *hidden* (gate, up), one that does not is a *reader*
(query, key). No model is recognised by its name.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PROBE_TOKEN = 1


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a block."""

    name: str
    module: nn.Module  # the PEFT wrapper where there is one
    role: str  # writer, value, hidden or reader
    writer: "Matrix | None" = None
    """The writer that a value or hidden map feeds."""
    select: Tensor | None = None
    """Value: for each input of the writer, the output of this map that it copies, or -1."""
    scale: Tensor | None = None
    """Writer: the weight [d] of a norm between it and the residual stream, if there is one."""

    @property
    def base(self) -> nn.Module:
        return getattr(self.module, "base_layer", self.module)

    @property
    def out_features(self) -> int:
        return _out_features(self.base)

    def back(self, vectors: Tensor) -> Tensor:
        """Wᵀ v of the pretrained weight, for the columns of `vectors [d_out, k]`: `[d_in, k]` fp32.

        Through autograd, so that a quantised weight answers too.
        """
        weight = next(self.base.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        with torch.enable_grad():
            x = torch.zeros(
                vectors.shape[1], _in_features(self.base), device=weight.device, dtype=dtype
            ).requires_grad_()
            y = self.base(x)
            (gradient,) = torch.autograd.grad(y, x, vectors.mT.to(y))
        return gradient.mT.float()


@dataclass(frozen=True)
class Trained:
    """A parameter that training moves, seen from a matrix's outputs or from its inputs."""

    name: str
    parameter: nn.Parameter
    side: str  # the side of the parameter that a basis multiplies: where what it holds lies
    matrix: Matrix
    holds: str = "outputs"  # or "inputs"
    partner: nn.Parameter | None = None
    """Of a LoRA B, which starts at 0, the A that it is multiplied with; of the A, the B."""

    @property
    def size(self) -> int:
        """d of a basis for this."""
        return self.parameter.shape[0 if self.side == "left" else -1]


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

    def describe(self) -> str:
        """A line for each distinct kind of block: which map plays which part."""
        kinds: dict[str, list[int]] = {}
        for block in self.blocks:
            parts = [
                f"{role}: " + ", ".join(m.name.removeprefix(block.name + ".") for m in maps)
                for role in ("writer", "value", "hidden", "reader")
                if (maps := block.of_role(role))
            ]
            kinds.setdefault(" · ".join(parts), []).append(block.index)
        return "\n".join(
            f"blocks {found[0]}–{found[-1]} ({len(found)}), width {self.width}: {kind}"
            for kind, found in kinds.items()
        )

    def trained(self) -> list[Trained]:
        """Every trainable parameter of the blocks' linear maps that acts on their outputs.

        Raises:
            ValueError: an adapter whose update is not B A with B starting at 0 (DoRA).
        """
        return [t for block in self.blocks for m in block.matrices for t in _trained(m)]

    def reading(self) -> list[Trained]:
        """The parameters of the same updates that act on the maps' inputs: LoRA A, or a weight."""
        return [_reading(t) for t in self.trained() if t.parameter.ndim > 1]

    def untracked(self) -> list[str]:
        """Trainable parameters that are neither `trained()` nor a LoRA A."""
        tracked = {id(t.parameter) for t in self.trained()}
        return [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and id(p) not in tracked and ".lora_A." not in name
        ]


def inspect(model: nn.Module) -> Architecture:
    """Find a decoder's blocks, and each linear map's part in them, by running one token.

    Args:
        model: any `transformers` decoder, wrapped by PEFT or not; its weights on one device.

    Raises:
        ValueError: the model is no decoder-only model, or a block is not understood; says which.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model is a {type(model).__name__} without a config; give a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoders are guarded")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = config.hidden_size
    name, blocks = _find_blocks(model)
    linears = [_linears(f"{name}.{i}", block) for i, block in enumerate(blocks)]
    for i, block in enumerate(blocks):
        _refuse_unknown(f"{name}.{i}", block, linears[i])
    trace = _Trace(model, linears)
    found = tuple(
        Block(i, f"{name}.{i}", block, _understand(trace, f"{name}.{i}", block, linears[i], width))
        for i, block in enumerate(blocks)
    )
    return Architecture(model, width, found)


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
    B = [layer.scaling[n] * layer.lora_B[n].weight.detach().float() for n in names]
    A = [layer.lora_A[n].weight.detach().float() for n in names]
    return torch.cat(B, 1), torch.cat(A, 0)


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, where it has any."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else ExitStack():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in, which may be mixed."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for _, outer, _ in candidates)
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or inside:
            continue
        if any(_is_linear(m) for m in module.modules()):
            candidates.append((sum(p.numel() for p in module.parameters()), name, module))
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no list of blocks; give a decoder")
    _, name, blocks = max(candidates, key=lambda c: c[0])
    return name, blocks


def _linears(prefix: str, block: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules(prefix=prefix):
        inside = any(name.startswith(outer + ".") for outer in found)
        if not inside and _is_linear(getattr(module, "base_layer", module)):
            found[name] = module
    return found


def _refuse_unknown(prefix: str, block: nn.Module, linears: dict[str, nn.Module]) -> None:
    known = {id(p) for m in linears.values() for p in m.parameters()}
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.ndim > 1 and id(parameter) not in known:
            raise ValueError(
                f"{name} {list(parameter.shape)} is in no linear map (a mixture of experts, or a "
                "layer of another kind); such blocks can't be guarded"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _out_features(base: nn.Module) -> int:
    return base.nf if type(base).__name__ == "Conv1D" else base.out_features


def _in_features(base: nn.Module) -> int:
    return base.nx if type(base).__name__ == "Conv1D" else base.in_features


class _Trace:
    """Runs one token and keeps what each linear map took in.

    Every map but the writers is made to put out a constant, or, one at a time in each block, a code
    that names each of its outputs. What arrives at the writer tells the rest.
    """

    def __init__(self, model: nn.Module, blocks: list[dict[str, nn.Module]]):
        self.model = model
        self.linears = [m for found in blocks for m in found.values()]
        self.norm_of: dict[int, nn.Module] = {}
        self.inputs = self._run({})
        self.order = {key: n for n, key in enumerate(self.inputs)}  # as they ran
        flat = {id(m): torch.tensor(0.5) for m in self.linears}
        self.flat = self._run(flat)
        # All inputs while a map's outputs are coded, once for each of the code's two digits.
        self.coded: dict[int, list[dict[int, Tensor]]] = {id(m): [] for m in self.linears}
        for position in range(max(map(len, blocks))):
            coded = [list(found.values())[position] for found in blocks if position < len(found)]
            for digit in (0, 1):
                seen = self._run(flat | {id(m): _code(m)[digit] for m in coded})
                for m in coded:
                    self.coded[id(m)].append(seen)

    def _run(self, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        inputs: dict[int, Tensor] = {}
        produced: dict[int, tuple[int, Tensor]] = {}  # holding the tensors keeps ids unique

        def linear_hook(module, args, output):
            inputs[id(module)] = args[0].detach().float().reshape(-1)
            if id(module) in outputs:
                output = outputs[id(module)].to(output).expand_as(output).clone()
            produced[id(output)] = (id(module), output)
            return output

        def norm_hook(module, args, output):
            if args and id(args[0]) in produced:
                self.norm_of[produced[id(args[0])][0]] = module

        inner = {id(c) for m in self.linears for c in m.modules()}
        norms = [m for m in self.model.modules() if id(m) not in inner and _is_norm(m)]
        hooks = [m.register_forward_hook(linear_hook) for m in self.linears]
        hooks += [m.register_forward_hook(norm_hook) for m in norms]
        token = torch.full((1, 1), PROBE_TOKEN, device=next(self.model.parameters()).device)
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(input_ids=token, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs


def _code(module: nn.Module) -> Tensor:
    """`[2, d_out]`: two digits of base 128 that name each output, small enough for bf16.

    The sign alternates, so that an activation function can't pass for a copy.
    """
    index = torch.arange(_out_features(getattr(module, "base_layer", module)))
    return torch.stack([1 + index % 128, 1 + index // 128]) * (1 - 2 * (index % 2))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def _understand(
    trace: _Trace, prefix: str, block: nn.Module, linears: dict[str, nn.Module], width: int
) -> tuple[Matrix, ...]:
    branches: dict[str, list[str]] = {}
    for name, module in linears.items():
        if id(module) in trace.order:
            child = name.removeprefix(prefix + ".").split(".")[0]
            # Linear maps that hang on the block itself (OPT's fc1, fc2) form one branch.
            branch = "" if getattr(block, child) is module else child
            branches.setdefault(branch, []).append(name)
    if not branches:
        raise ValueError(f"{prefix}: no linear map ran for a text token; this block can't be read")
    idle = [name for name, module in linears.items() if id(module) not in trace.order]
    if idle:
        raise ValueError(
            f"{prefix}: {idle[0]} did not run for a token (a mixture of experts?); "
            "such blocks can't be guarded"
        )
    matrices: list[Matrix] = []
    for names in branches.values():
        names.sort(key=lambda n: trace.order[id(linears[n])])
        *others, last = names
        writer = _writer(trace, last, linears[last], width)
        matrices.append(writer)
        matrices += [_source(trace, name, linears[name], writer) for name in others]
    return tuple(matrices)


def _writer(trace: _Trace, name: str, module: nn.Module, width: int) -> Matrix:
    base = getattr(module, "base_layer", module)
    if _out_features(base) != width:
        raise ValueError(
            f"{name} runs last in its branch but has {_out_features(base)} outputs, not the "
            f"width {width}; this block can't be read"
        )
    norm = trace.norm_of.get(id(module))
    if norm is None:
        return Matrix(name, module, "writer")
    device = next(norm.parameters()).device
    with torch.no_grad():  # an RMS norm maps ones to its weight, whatever it adds to that weight
        ones = torch.ones(1, width, device=device, dtype=norm.weight.dtype)
        scale, double = norm(ones).float()[0], norm(-ones).float()[0]
    if not torch.allclose(scale, -double):
        raise ValueError(f"{name} feeds a norm with a bias or a mean; this block can't be read")
    return Matrix(name, module, "writer", scale=scale)


def _source(trace: _Trace, name: str, module: nn.Module, writer: Matrix) -> Matrix:
    low, high = (seen[id(writer.module)] for seen in trace.coded[id(module)])
    code = _code(module).to(low)
    index = (low.abs() - 1 + 128 * (high.abs() - 1)).round().long()
    named = code[:, index.clamp(0, code.shape[1] - 1)]
    if torch.equal(low, trace.flat[id(writer.module)]):
        return Matrix(name, module, "reader", writer)
    if torch.equal(named, torch.stack([low, high])):
        return Matrix(name, module, "value", writer, select=index)
    return Matrix(name, module, "hidden", writer)


def _adapters(module: nn.Module) -> list[str]:
    return list(getattr(module, "lora_B", {}))


def _trained(matrix: Matrix) -> Iterator[Trained]:
    module, base = matrix.module, matrix.base
    for adapter in _adapters(module):
        parameter = module.lora_B[adapter].weight
        if not parameter.requires_grad:
            continue
        if adapter in getattr(module, "lora_magnitude_vector", {}):
            raise ValueError(
                f"{matrix.name} is trained with DoRA, whose magnitude rescales the pretrained "
                "content along the factor too; train with LoRA (use_dora=False)"
            )
        A = module.lora_A[adapter].weight
        name = f"{matrix.name}.lora_B.{adapter}"
        yield Trained(name, parameter, "left", matrix, partner=A)
    transposed = type(base).__name__ == "Conv1D"
    if base.weight.requires_grad:
        side = "right" if transposed else "left"
        yield Trained(f"{matrix.name}.weight", base.weight, side, matrix)
    if base.bias is not None and base.bias.requires_grad:
        yield Trained(f"{matrix.name}.bias", base.bias, "right", matrix)


def _reading(t: Trained) -> Trained:
    if t.partner is None:
        side = "left" if t.side == "right" else "right"
        return Trained(f"{t.name} (inputs)", t.parameter, side, t.matrix, "inputs")
    name = t.name.replace(".lora_B.", ".lora_A.")
    return Trained(name, t.partner, "right", t.matrix, "inputs", t.parameter)
