"""Find a decoder's parts by running it: one token tells its linear maps apart.

Attention over a single position hands the value on unchanged, so what a map's outputs do to the
writer's input says what part it plays. No model is recognised by its name.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grasp.model.architecture import Architecture, Block, Matrix, out_features
from grasp.model.experts import Wrapped, refuse_unheard, stacked, wrapped
from grasp.model.modes import evaluating, given, is_linear, unfused, unwrapped_name
from grasp.model.partitions import shape
from grasp.model.sharding import gathered

PROBE_TOKEN = 1


def inspect(model: nn.Module) -> Architecture:
    """Find a decoder's blocks, and each linear map's part in them, by running one token.

    Args:
        model: any `transformers` decoder, wrapped by PEFT or not; its weights on one device.

    Raises:
        ValueError: the model is no decoder-only model, does not run on text alone, or what is
            trained in a block is no linear map that runs for every token; says which. What is not
            trained need not be understood.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model is a {type(model).__name__} without a config; give a decoder")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoders are guarded")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = config.hidden_size
    name, blocks = _find_blocks(model)
    name = unwrapped_name(name)
    linears, routed = [], []
    for i, block in enumerate(blocks):
        maps = _linears(f"{name}.{i}", block)
        _refuse_unknown(f"{name}.{i}", block, maps)
        linears.append({n: m for n, m in maps.items() if not stacked(m)})
        routed.append([w for n, m in maps.items() if stacked(m) for w in wrapped(n, m)])
    routed = _heard(model, routed)
    outside = _outside(model, name, linears)
    trace = _Trace(model, linears, outside)
    found = []
    for i, block in enumerate(blocks):
        maps = _understand(trace, f"{name}.{i}", block, linears[i], width)
        found.append(Block(i, f"{name}.{i}", block, (*maps, *routed[i])))
    others = [
        Matrix(n, m, "other", taken=trace.taken[id(m)])
        for n, m in outside.items()
        if id(m) in trace.order
    ]
    return Architecture(model, width, tuple(found), tuple(others))


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's: of a model with a vision tower that is what `get_decoder` gives."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((n for n, m in model.named_modules() if m is decoder), "")
    # What it gives may be no decoder: it goes by names, and one family calls its head so.
    lists = _lists(model, prefix) or _lists(model, "")
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks; give a decoder")
    if len(lists) > 1:  # one may encode images, which no token runs through
        ran = _ran(model, lists.values())
        lists = {n: blocks for n, blocks in lists.items() if id(blocks) in ran} or lists
    return max(lists.items(), key=lambda found: sum(p.numel() for p in found[1].parameters()))


def _lists(model: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules with linear maps."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        inside = any(name.startswith(outer + ".") for outer in found)
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or inside:
            continue
        if any(is_linear(m) for m in module.modules()):
            found[name] = module
    return found


def _ran(model: nn.Module, lists: Iterable[nn.ModuleList]) -> set[int]:
    """The ids of the lists that a token runs through."""
    ran: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda m, args, found=found: ran.add(id(found)))
        for found in lists
        for module in found
    ]
    _run_token(model, handles)
    return ran


def _run_token(model: nn.Module, handles: list[RemovableHandle]) -> None:
    """Run one token with hooks that are removed afterwards.

    Raises:
        ValueError: the model asks for more than a token; says what.
    """
    token = torch.full((1, 1), PROBE_TOKEN, device=next(model.parameters()).device)
    try:
        with evaluating(model), unfused(model), torch.no_grad():
            model(input_ids=token, use_cache=False)
    except (TypeError, ValueError) as error:
        asked = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} does not run on token ids alone ({asked}); give a model that "
            "does, such as the language model inside it (model.get_decoder())"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _linears(prefix: str, block: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules(prefix=prefix):
        name = unwrapped_name(name)
        inside = any(name.startswith(outer + ".") for outer in found)
        if not inside and (stacked(module) or is_linear(getattr(module, "base_layer", module))):
            found[name] = module
    return found


def _outside(
    model: nn.Module, blocks: str, linears: list[dict[str, nn.Module]]
) -> dict[str, nn.Module]:
    """Linear maps in no block that a LoRA is trained on: a head, a projection of embeddings."""
    known = {id(m) for found in linears for m in found.values()}
    return {
        unwrapped_name(name): module
        for name, module in model.named_modules()
        if not unwrapped_name(name).startswith(blocks + ".")
        and id(module) not in known
        and is_linear(getattr(module, "base_layer", module))
        and any(
            p.requires_grad for B in getattr(module, "lora_B", {}).values() for p in B.parameters()
        )
    }


def _refuse_unknown(prefix: str, block: nn.Module, linears: dict[str, nn.Module]) -> None:
    known = {
        id(p)
        for m in linears.values()
        for name, p in m.named_parameters()
        if not stacked(m) or "lora_" in name
    }
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.requires_grad and len(shape(parameter)) > 1 and id(parameter) not in known:
            raise ValueError(
                f"{name} {list(shape(parameter))} is trained, but in no linear map (a mixture of "
                "experts, or a layer of another kind), so it can't be guarded; train the attention "
                "alone, or the linear maps"
            )


def _heard(model: nn.Module, found: list[list[Wrapped]]) -> list[list[Wrapped]]:
    """Those of which is heard what they take in.

    Raises:
        ValueError: another is trained; says which.
    """
    if not any(found):
        return found
    heard: set[str] = set()
    handles = [
        w.watch(lambda x, tokens, name=w.name: heard.add(name)) for part in found for w in part
    ]
    _run_token(model, handles)
    for unheard in (w for part in found for w in part if w.name not in heard):
        refuse_unheard(unheard)
    return [[w for w in part if w.name in heard] for part in found]


class _Trace:
    """Runs one token and keeps what each linear map took in.

    Every map but the writers is made to put out a constant, or, one at a time in each block, a code
    that names each of its outputs. What arrives at the writer tells the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[dict[str, nn.Module]],
        outside: dict[str, nn.Module],
    ):
        self.model = model
        self.linears = [m for found in blocks for m in found.values()]
        self.watched = [*self.linears, *outside.values()]
        self.norm_of: dict[int, nn.Module] = {}
        self.taken: dict[int, Tensor] = {}
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

        def linear_hook(module, args, kwargs, output):
            x = given(args, kwargs).detach()
            self.taken[id(module)] = x.new_empty(0)
            inputs[id(module)] = x.float().reshape(-1)
            if not isinstance(output, Tensor):  # a router, which hands on its choice as well
                return None
            if id(module) in outputs:
                output = outputs[id(module)].to(output).expand_as(output).clone()
            produced[id(output)] = (id(module), output)
            return output

        def norm_hook(module, args, output):
            if args and id(args[0]) in produced:
                self.norm_of[produced[id(args[0])][0]] = module

        inner = {id(c) for m in self.watched for c in m.modules()}
        norms = [m for m in self.model.modules() if id(m) not in inner and _is_norm(m)]
        hooks = [m.register_forward_hook(linear_hook, with_kwargs=True) for m in self.watched]
        hooks += [m.register_forward_hook(norm_hook) for m in norms]
        _run_token(self.model, hooks)
        return inputs


def _code(module: nn.Module) -> Tensor:
    """`[2, d_out]`: two digits of base 128 that name each output, small enough for bf16.

    The sign alternates, so that an activation function can't pass for a copy.
    """
    index = torch.arange(out_features(getattr(module, "base_layer", module)))
    return torch.stack([1 + index % 128, 1 + index // 128]) * (1 - 2 * (index % 2))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and len(shape(weight)) == 1 and not list(module.children())


def _understand(
    trace: _Trace, prefix: str, block: nn.Module, linears: dict[str, nn.Module], width: int
) -> tuple[Matrix, ...]:
    branches: dict[str, list[str]] = {}
    for name, module in linears.items():
        if id(module) not in trace.order:
            if any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"{name} is trained but did not run for a token (one of a mixture of experts, "
                    "or for images?), so it can't be guarded; leave it out of target_modules, or "
                    "train the attention alone"
                )
        else:
            branch = _branch(block, name.removeprefix(prefix + "."))
            branches.setdefault(branch, []).append(name)
    matrices: list[Matrix] = []
    for names in branches.values():
        names.sort(key=lambda n: trace.order[id(linears[n])])
        *others, last = names
        writer = _writer(trace, last, linears[last], width)
        if writer is None:  # a router, or a branch whose last map is no writer
            matrices += [
                Matrix(name, linears[name], "other", taken=trace.taken[id(linears[name])])
                for name in names
            ]
            continue
        matrices.append(writer)
        matrices += [_source(trace, name, linears[name], writer) for name in others]
    return tuple(matrices)


def _branch(block: nn.Module, name: str) -> str:
    """The part of a block that a linear map belongs to, which one writer ends.

    Those that hang on the block itself (OPT's fc1, fc2) form one; each part of a list is its own.
    """
    child, *rest = name.split(".")
    module = getattr(block, child)
    while rest and isinstance(module, nn.ModuleList):
        child, module = f"{child}.{rest[0]}", module[int(rest.pop(0))]
    return child if rest else ""


def _writer(trace: _Trace, name: str, module: nn.Module, width: int) -> Matrix | None:
    if out_features(getattr(module, "base_layer", module)) != width:
        return None
    norm = trace.norm_of.get(id(module))
    if norm is None:
        return Matrix(name, module, "writer", taken=trace.taken[id(module)])
    # An RMS norm maps ones to its weight, whatever it adds to that weight.
    with torch.no_grad(), gathered(norm):
        device = next(norm.parameters()).device
        ones = torch.ones(1, width, device=device, dtype=norm.weight.dtype)
        scale, double = norm(ones).float()[0], norm(-ones).float()[0]
    if not torch.allclose(scale, -double):  # a norm with a bias or a mean
        return None
    return Matrix(name, module, "writer", scale=scale, taken=trace.taken[id(module)])


def _source(trace: _Trace, name: str, module: nn.Module, writer: Matrix) -> Matrix:
    low, high = (seen[id(writer.module)] for seen in trace.coded[id(module)])
    code, taken = _code(module).to(low), trace.taken[id(module)]
    index = (low.abs() - 1 + 128 * (high.abs() - 1)).round().long()
    named = code[:, index.clamp(0, code.shape[1] - 1)]
    if torch.equal(low, trace.flat[id(writer.module)]):
        return Matrix(name, module, "reader", writer, taken=taken)
    if torch.equal(named, torch.stack([low, high])):
        return Matrix(name, module, "value", writer, select=index, taken=taken)
    return Matrix(name, module, "hidden", writer, taken=taken)
