"""A training step, plain and guarded, side by side: what the guard costs where it is used."""

from collections.abc import Callable
from statistics import median

import harness
import torch
from torch import Tensor, nn

import grasp_kernels as gk

from .inside import Inside

Step = Callable[..., None]
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
R = 16
PROMPTS, LENGTH, CONTINUED = 64, 8, 4  # tokens the guard looks at: a few hundred inputs to block


def measure(inside: Inside) -> None:
    steps, guard = _steps(inside)
    for accumulated in (1, 4):
        runs = {name: lambda s=step, g=accumulated: s(g) for name, step in steps.items()}
        taken = harness.samples(runs, inside.device, 2 if inside.tiny else 15, wall=True)
        times = {name: median(t) for name, t in taken.items()}
        inside.add(
            case=f"accumulation {accumulated}",
            ms=times,
            over_plain={name: t / times["plain"] for name, t in times.items()},
            spread=max(map(harness.spread, taken.values())),
        )
    if guard is not None:
        found = guard.certificate()
        inside.check(found["holds"], what="certificate", through=found["through"])
    inside.clocks()


def _steps(inside: Inside) -> tuple[dict[str, Step], object | None]:
    """Plain and guarded, and the guard, where there is one."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as missing:
        inside.add(what="model", model="linear maps", of=f"{missing.name} is not installed")
        return _linear(inside), None
    return _decoder(inside)


def one_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """Of as many micro-batches as are asked for."""

    def step(accumulated: int = 1) -> None:
        for _ in range(accumulated):
            (loss() / accumulated).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def grown(guard, step: Callable[[], None]):
    """After a step in which its bases grew, the guard as after the first steps of a run."""
    guard.attach()
    step()
    guard.growth.every = 10**9
    return guard


def _decoder(inside: Inside) -> tuple[dict[str, Step], object]:
    """A Llama with random weights in bf16 and an fp32 LoRA on every linear map."""
    from grasp import Guard

    rows, tokens = (2, 8) if inside.tiny else (4, 512)
    steps, prompts = {}, _prompts(TINY if inside.tiny else CONFIG)
    for name in ("plain", "guarded"):
        model, trained = _with_lora(inside)
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=inside.device)
        loss = lambda model=model, ids=ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
        steps[name] = one_step(loss, optimizer)
        if name == "guarded":
            options = {"rank": 4, "every": 1, "refresh": 1, "grow": 4, "tokens": CONTINUED}
            guard = Guard(model, reference=prompts, optimizer=optimizer, **options)
            ranks = [m["rank"] for m in grown(guard, steps[name]).leak().values()]
    inside.add(
        what="model",
        model="llama, random weights",
        parameters=sum(p.numel() for p in model.parameters()),
        batch=[rows, tokens],
        lora_rank=R,
        mean_rank=sum(ranks) / len(ranks),
    )
    return steps, guard


def _prompts(config: dict) -> list[list[int]]:
    made = torch.Generator().manual_seed(0)
    return torch.randint(3, config["vocab_size"], (PROMPTS, LENGTH), generator=made).tolist()


def _with_lora(inside: Inside) -> tuple[nn.Module, list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = TINY if inside.tiny else CONFIG
    with torch.device(inside.device):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    lora = LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    return model, trained


class _Low(nn.Module):
    """A frozen linear map with a LoRA."""

    def __init__(self, d: int, device: torch.device):
        super().__init__()
        self.W = nn.Parameter(torch.randn(d, d, device=device).bfloat16() / d**0.5, False)
        self.A = nn.Parameter(torch.randn(R, d, device=device) / d**0.5)
        self.B = nn.Parameter(torch.zeros(d, R, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = x.float() @ self.A.mT @ self.B.mT
        return x + torch.tanh(x @ self.W.mT + low.to(x.dtype))


def _linear(inside: Inside) -> dict[str, Step]:
    """Torch alone, and what a guard does: gradients before the optimizer's step, weights after."""
    d, layers, rows = (32, 2, 8) if inside.tiny else (2048, 48, 2048)
    steps = {}
    for name in ("plain", "guarded"):
        model = nn.Sequential(*(_Low(d, inside.device) for _ in range(layers)))
        x = torch.randn(rows, d, device=inside.device, dtype=torch.bfloat16)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        if name == "guarded":
            _keep_off(model, optimizer, d)
        steps[name] = one_step(lambda m=model, x=x: m(x).float().square().mean(), optimizer)
    return steps


def _keep_off(model: nn.Module, optimizer: torch.optim.Optimizer, d: int) -> None:
    for holds, k, side in (("A", d * 2 // 5, "right"), ("B", 4, "left")):
        Ts = [p for name, p in model.named_parameters() if name.endswith(holds)]
        V = torch.linalg.qr(torch.randn(d, k, device=Ts[0].device)).Q
        Us = [V.clone() for _ in Ts]
        Cs = [
            T.detach() @ U if side == "right" else U.mT @ T.detach()
            for T, U in zip(Ts, Us, strict=True)
        ]
        gradients, weights = gk.Projector(Ts, Us, side=side), gk.Projector(Ts, Us, Cs, side=side)
        optimizer.register_step_pre_hook(lambda *_, p=gradients, Ts=Ts: p([T.grad for T in Ts]))
        optimizer.register_step_post_hook(lambda *_, p=weights: p())
