"""Tiny real models for tests."""

import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from grasp import Guard, Subspaces
from grasp_kernels.testing import orthonormal

WIDTH = 32
COMMON = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
GPT2 = {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "bos_token_id": 1}

PROMPTS = torch.randint(3, 64, (40, 5), generator=torch.Generator().manual_seed(1)).tolist()

FAMILIES = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**HEADED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**HEADED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**HEADED)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**HEADED)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**HEADED)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**HEADED)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, eos_token_id=2)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON)),
}


def build(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    # Initial weights are small; larger ones make every part of a block count.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model.eval()


def with_lora(model: torch.nn.Module, targets="all-linear", r: int = 4, **options):
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config)


def batch(rows: int = 4, tokens: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps: int, accumulate: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        for part in range(accumulate):
            loss = model(**batch(seed=step * accumulate + part)).loss / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def subspaces(k: int = 3) -> Subspaces:
    return Subspaces.from_bases({i: orthonormal(WIDTH, k, seed=i) for i in (0, 1)})


def inside(guard: Guard) -> float:
    """The largest share of any guarded gradient that lies in what is blocked."""
    shares = []
    for g in guard.guarded:
        G = g.parameter.grad
        shares.append(float(g.coefficients(G, g.blocked_basis).norm() / G.float().norm()))
    return max(shares)
