"""A LoRA on the stacked weights of routed experts: each is kept off what it takes in itself.

What an expert takes in is read here off the class's own loop over its experts, where it multiplies
with a slice of the stacked weight; what PEFT adds to each expert off `get_delta_weight`.
"""

import copy
import json
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import Trainer

import grasp
from grasp import Guard, Reference
from grasp.bases import inputs, spectrum
from grasp.guard.trainer import CERTIFICATE
from grasp.model import inspect, load_adapter, lora_update
from grasp.study.rivals._shared import loras
from tests.families import ATTENTION, FAMILIES
from tests.models import PROMPTS, WIDTH, train, trainable, with_lora
from tests.test_trainer import ROWS, arguments

ROUTED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NAMES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]


def routed(family: str, targets=("o_proj",), parameters=ROUTED):
    model = FAMILIES[family].build()
    model.set_experts_implementation("eager")
    return with_lora(model, list(targets), target_parameters=parameters)


def wrappers(model) -> dict[str, torch.nn.Module]:
    """By what the guard calls the parameter."""
    return {
        f"{name.removesuffix('.base_layer')}.{m.parameter_name}": m
        for name, m in model.named_modules()
        if hasattr(m, "parameter_name")
    }


def deltas(model) -> dict[str, torch.Tensor]:
    """`[d_out, d_in]` that PEFT adds to each expert, by its name."""
    found = {}
    for name, m in wrappers(model).items():
        D = copy.deepcopy(m).double().get_delta_weight("default").detach()
        D = D.mT if getattr(m.get_base_layer(), "is_transposed", False) else D
        found |= {f"{name}.{e}": part for e, part in enumerate(D)}
    return found


def shares(guard: Guard, before: dict, after: dict) -> list[float]:
    """‖Uᵀ ΔW‖ / ‖ΔW‖ and ‖ΔW V‖ / ‖ΔW‖ of every expert that moved."""
    found = []
    for name in after:
        D = after[name] - before[name]
        U, V = (guard.bases.get(f"{name}.lora_{f}.default") for f in "BA")
        if float(D.norm()) > 0:
            found += [] if U is None else [float((U.double().mT @ D).norm() / D.norm())]
            found.append(float((D @ V.double()).norm() / D.norm()))
    return found


class Heard(TorchFunctionMode):
    """What is multiplied with slices of stacked weights, by where the slice lies in memory."""

    def __init__(self):
        super().__init__()
        self.rows: dict[int, list[torch.Tensor]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        names = ("linear", "matmul", "__matmul__")
        if getattr(function, "__name__", "") in names and args[1].ndim == 2:
            self.rows.setdefault(args[1].data_ptr(), []).append(args[0].detach().double())
        return out


def taken(model, reference: Reference, held: bool | None = None) -> dict[str, torch.Tensor]:
    """`[tokens, d_in]` of each expert, of held-out prompts, the others, or all, one by one."""
    heard = Heard()
    with heard, torch.no_grad(), model.disable_adapter():
        for i, (ids, mask) in enumerate(zip(reference.ids, reference.mask, strict=True)):
            if held in (None, i % inputs.HELD_OUT == inputs.HELD_OUT - 1):
                model(input_ids=ids[mask.bool()][None], use_cache=False)
    found = {}
    for name, m in wrappers(model).items():
        for e, W in enumerate(m.get_param()):
            rows = heard.rows.get(W.data_ptr(), [torch.zeros(0, m.in_features)])
            found[f"{name}.{e}"] = torch.nn.functional.normalize(torch.cat(rows).double(), dim=1)
    return found


def found_of(model, reference, energy=0.9):
    found = inspect(model)
    matrices = [m for b in found.blocks for m in b.matrices if m.index is not None]
    bases = inputs.input_bases(found, matrices, list(reference.rows()), energy)
    return matrices, {name: basis for names, basis in bases for name in names}


@pytest.mark.parametrize("family", NAMES)
def test_each_expert_is_kept_off_its_bases(family):
    model = routed(family)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = deltas(model)
    options = {"tokens": 8, "every": 1, "refresh": 1, "rank": 2, "read": 0.9}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fewer than")
        guard = Guard(model, reference=PROMPTS, optimizer=optimizer, **options).attach()
    train(model, optimizer, 4)
    found = guard.certificate()
    guard.detach()
    assert found["holds"] and not found["uncovered"]
    after = deltas(model)
    seen = shares(guard, before, after)
    assert len(seen) >= len(after) and max(seen) <= 1e-6
    assert len(after) == (8 if family == "deepseek_v3" else 16)
    held = {g.name: g for g in guard.guarded}
    for name, said in found["modules"].items():
        if ".experts." in name and name not in found["unmoved"]:
            expert = name.rsplit(".", 2)[0]
            D, g = after[expert] - before[expert], held[name]
            basis = torch.linalg.qr(g.basis.double()).Q  # V, or W, to more than fp32's rounding
            inside = basis.mT @ D if ".lora_B." in name else D @ basis
            inside = D - inside @ basis.mT if g.inside else inside
            share = float(inside.norm() / D.norm())
            assert said["through"] == pytest.approx(share, rel=1e-2, abs=1e-9)
    train(model, optimizer, 1)  # unguarded
    assert max(shares(guard, before, deltas(model))) > 1e-3


@pytest.mark.parametrize("family", NAMES)
def test_bases_are_of_the_tokens_that_reach_each_expert(family):
    model = routed(family)
    reference = Reference(model, PROMPTS, tokens=20, batch=5)
    expected, held = taken(model, reference, False), taken(model, reference, True)
    model.set_experts_implementation("grouped_mm")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fewer than")
        matrices, bases = found_of(model, reference)
    assert {m.name for m in matrices} == expected.keys()
    reached = [name for name, X in expected.items() if len(X) >= inputs.FEW]
    assert len(reached) > len(expected) / 2
    for name in reached:
        V, X, H = bases[name].V.double(), expected[name], held[name]
        vectors = torch.linalg.svd(X, full_matrices=False).Vh.mT
        k, most = V.shape[1], vectors.shape[1]
        assert float((vectors[:, :k].mT @ V).norm()) ** 2 == pytest.approx(k, abs=1e-3)

        def share(D, H=H):
            return float((H @ D).square().sum() / H.square().sum())

        assert bases[name].share == pytest.approx(share(V), abs=1e-5)
        assert share(V) >= 0.9 - 1e-5 or k == min(most, len(V) - -(-len(V) // spectrum.ROOM))
        assert share(vectors[:, : k - 1]) < 0.9 + 1e-4
    firsts = [bases[n].V for n in reached if "gate_up" in n and ".1." in n]
    assert not all(torch.equal(firsts[0], V) for V in firsts[1:])


def test_experts_that_few_tokens_reach_are_named_and_kept_off_all_of_them(monkeypatch):
    model = routed("mixtral")
    reference = Reference(model, PROMPTS[:4], tokens=2, batch=3)  # none is held out
    expected = taken(model, reference)
    monkeypatch.setattr(inputs, "FEW", 10**6)
    with pytest.warns(
        UserWarning, match=r"reach 16 matrices of experts \(.*experts\.down_proj\.0, .*tokens"
    ):
        matrices, bases = found_of(model, reference)
    everything = {
        block: torch.cat([X for n, X in expected.items() if block in n and "gate_up" in n])
        for block in (".0.mlp", ".1.mlp")
    }
    for m in matrices:
        if "gate_up" not in m.name:
            continue
        X = everything[m.name[m.name.index("layers.") + 6 :][:6]]
        V = bases[m.name].V.double()
        assert (X @ V).square().sum() / X.square().sum() >= 0.9 - 1e-5


def test_an_expert_that_no_token_reaches_is_guarded():
    model = routed("mixtral")
    gate = model.get_submodule("base_model.model.model.layers.1.mlp.gate")
    with torch.no_grad():
        gate.weight.mul_(0)  # ties go to the first two
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    reference = Reference(model, PROMPTS, tokens=4)
    unreached = [n for n, X in taken(model, reference).items() if not len(X)]
    assert len(unreached) == 4
    with pytest.warns(UserWarning, match="fewer than 32 tokens of the reference reach"):
        guard = Guard(model, reference=reference, optimizer=optimizer, rank=2).attach()
    for name in unreached:
        assert guard.bases[f"{name}.lora_A.default"].shape[1] >= 1
    with torch.no_grad():
        gate.weight.normal_()  # now they are reached
    before = deltas(model)
    train(model, optimizer, 3)
    assert guard.certificate()["holds"]
    after = deltas(model)
    guard.detach()
    assert all(float(after[n].norm()) > 0 for n in unreached)
    assert max(shares(guard, before, after)) <= 1e-6


def test_experts_go_on_from_what_they_learned_and_from_a_saved_state(tmp_path):
    model = routed("qwen3_moe")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 3)
    before = deltas(model)
    assert all(float(D.norm()) > 0 for D in before.values())
    options = {"tokens": 4, "every": 1, "refresh": 1, "rank": 2, "read": 0.5}

    def guard():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return Guard(model, reference=PROMPTS, optimizer=optimizer, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first = guard().attach()
        train(model, optimizer, 2)
        state = first.save(tmp_path / "guard.safetensors")
        first.detach()
        second = guard().attach(state)
    train(model, optimizer, 2)
    assert all(torch.equal(second.bases[n][:, :1], V[:, :1]) for n, V in first.bases.items())
    found = second.certificate()
    assert found["holds"] and max(m["bound"] for m in found["modules"].values()) < 1e-5
    assert max(shares(second, before, deltas(model))) <= 2e-6
    second.detach()


def shared(family: str):
    """PEFT takes DeepSeek's `gate_proj` for the routed experts' wherever it is a module's name."""
    built = FAMILIES[family].build()
    if family == "qwen2_moe":
        return with_lora(built, r".*shared_expert\.(gate|up|down)_proj")
    parts = [f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")]
    return with_lora(built, ["o_proj"], target_parameters=parts)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_are_linear_maps_like_others(family):
    model = shared(family)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options = {"tokens": 2, "every": 1, "refresh": 1, "rank": 2}
    with Guard(model, reference=PROMPTS, optimizer=optimizer, **options) as guard:
        train(model, optimizer, 3)
        assert guard.certificate()["holds"]
    seen = 0
    for module_name, m in model.named_modules():
        if "shared_expert" in module_name and getattr(m, "lora_B", None):
            D = copy.deepcopy(m).double().get_delta_weight("default").detach()
            U, V = (guard.bases[f"{module_name}.lora_{f}.default"].double() for f in "BA")
            assert float((U.mT @ D).norm() / D.norm()) <= 1e-6
            assert float((D @ V).norm() / D.norm()) <= 1e-6
            seen += 1
    assert seen == (6 if family == "qwen2_moe" else 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_all_linear_with_peft_is_the_router_and_every_expert(family):
    model = with_lora(FAMILIES[family].build())
    routers = [n for n in wrappers(model) if n.endswith("mlp.gate.weight")]
    assert len(routers) == (1 if family == "deepseek_v3" else 2)
    reference = Reference(model, PROMPTS, tokens=20, batch=5)
    heard, X = {n: wrappers(model)[n].get_base_layer() for n in routers}, {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: X.setdefault(n, []).append(a[0]))
        for n, m in heard.items()
    ]
    with torch.no_grad():
        for ids, mask in zip(reference.ids, reference.mask, strict=True):
            model(input_ids=ids[mask.bool()][None])
    for handle in handles:
        handle.remove()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    options = {"every": 1, "refresh": 1, "rank": 2, "read": 0.9}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fewer than")
        guard = Guard(model, reference=reference, optimizer=optimizer, **options).attach()
    train(model, optimizer, 3)
    assert guard.certificate()["holds"]
    guard.detach()
    for name in routers:
        m = wrappers(model)[name]
        D = (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach().double()
        U, V = (guard.bases[f"{name}.lora_{f}.default"].double() for f in "BA")
        assert float((U.mT @ D).norm() / D.norm()) <= 1e-6
        assert float((D @ V).norm() / D.norm()) <= 1e-6
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in X[name]]).double()
        rows = torch.nn.functional.normalize(rows, dim=1)
        assert (rows @ V).square().sum() / rows.square().sum() >= 0.9 - 1e-5
    train(model, optimizer, 1)  # unguarded
    D = m.get_delta_weight("default").detach().double()
    assert float((D @ V).norm() / D.norm()) > 1e-3


def test_what_is_known_of_an_expert_is_so():
    for family in ("mixtral", "gpt_oss"):
        model = routed(family)
        with torch.no_grad():
            for p in trainable(model):
                p.normal_()
        expected = deltas(model)
        for m in (m for b in inspect(model).blocks for m in b.matrices if m.index is not None):
            B, A = lora_update(m)
            torch.testing.assert_close((B @ A).double(), expected[m.name], rtol=1e-5, atol=1e-4)
            W = m.module.get_param()[m.index].detach()
            W = W.mT if family == "gpt_oss" else W
            assert m.out_features == W.shape[0] == expected[m.name].shape[0]
            v = torch.randn(W.shape[0], 2)
            torch.testing.assert_close(m.back(v), W.mT @ v)
            assert m.norm() == pytest.approx(float(W.norm()), rel=1e-5)


def test_rivals_that_change_a_lora_refuse_experts_by_name():
    with pytest.raises(ValueError, match=r"experts\..*_proj\.0 is one of a mixture's experts"):
        loras(routed("mixtral"))


def test_subspaces_alone_leave_experts_open_and_say_so():
    model = routed("mixtral", ATTENTION)
    given = grasp.Subspaces.from_bases({i: torch.eye(WIDTH, 2) for i in (0, 1)})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.warns(UserWarning, match=r"does not cover: .*experts\..*_proj\.0\.lora_B"):
        Guard(model, given, optimizer=optimizer).attach().detach()


@pytest.mark.parametrize(
    ("family", "parameters", "message"),
    [
        ("llama4_text", ["experts.down_proj"], "experts.down_proj of a Llama4TextExperts"),
        ("gpt_oss", ["experts.down_proj_bias"], "experts.down_proj_bias of a GptOssExperts"),
    ],
)
def test_other_parameters_are_refused_by_name(family, parameters, message):
    model = with_lora(FAMILIES[family].build(), ATTENTION, target_parameters=parameters)
    with pytest.raises(ValueError, match=f"{message} is trained.*leave it out of target_param"):
        inspect(model)


def test_a_trainer_certifies_what_it_saves_of_experts(tmp_path):
    model = with_lora(FAMILIES["qwen3_moe"].build())
    before = deltas(model)
    pace = {"every": 1, "refresh": 1, "rank": 2, "read": 0.8}
    hold = grasp.GraspCallback(reference=PROMPTS, tokens=4, **pace)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    given = {"train_dataset": ROWS, "callbacks": [hold]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fewer than")
        Trainer(model, arguments(tmp_path, **options), **given).train()
    model.save_pretrained(tmp_path / "kept")
    assert json.loads((tmp_path / CERTIFICATE).read_text())["holds"]
    saved = load_adapter(model.unload(), tmp_path / "kept")
    after = deltas(saved)
    assert all(float(D.norm()) > 0 for D in after.values())
    routed = {n: D for n, D in after.items() if ".experts." in n}
    assert len(routed) == 16 and max(shares(hold.guard, before, routed)) <= 1e-6


def test_a_resumed_guard_of_experts_goes_on_bit_for_bit(tmp_path):
    weights = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = with_lora(FAMILIES["qwen3_moe"].build())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        options = {"tokens": 4, "every": 1, "refresh": 2, "rank": 2, "read": 0.8}
        guard = Guard(model, reference=PROMPTS, optimizer=optimizer, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fewer than")
            guard.attach()
        train(model, optimizer, 3)
        if cut:
            state = guard.save(tmp_path / "guard.safetensors")
            guard.detach()
            guard = Guard(model, reference=PROMPTS, optimizer=optimizer, **options).attach(state)
        train(model, optimizer, 3)
        guard.detach()
        weights.append([p.detach().clone() for p in trainable(model)])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
