"""Directions taken out of all that writes to a model's residual stream, in one call.

    W ← W − U (Uᵀ W)      for every W [d, n] that writes: o_proj, down_proj, embeddings

python examples/kernels/abliteration.py
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import grasp_kernels as gk

WRITERS = ("o_proj.weight", "down_proj.weight")


def writers(model: nn.Module) -> dict[str, Tensor]:
    """Each weight as `[d, n]`, a view: what it writes is in the span of its columns."""
    found = {n: p.data for n, p in model.named_parameters() if n.endswith(WRITERS)}
    embedding = model.get_input_embeddings().weight.data  # its rows are what it writes
    return {"embeddings": embedding.mT, **found}


def ablate_(model: nn.Module, directions: Tensor) -> None:
    """Nothing is written along `directions` `[d, k]`, such as differences of mean activations."""
    U = directions.float().clone()
    gk.orthonormalize_(U)
    gk.project_(list(writers(model).values()), U, side="left", check=True)


def written(model: nn.Module, directions: Tensor) -> dict[str, float]:
    """‖Uᵀ W‖ / ‖W‖ of each, in fp64."""
    U = torch.linalg.qr(directions.double()).Q
    return {
        n: float((U.mT @ W.double()).norm() / W.double().norm()) for n, W in writers(model).items()
    }


def main() -> dict[str, float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # Tied, the output layer would lose the directions with the embeddings: then untie them first.
    config = LlamaConfig(vocab_size=256, tie_word_embeddings=False, **sizes, **heads)
    model = LlamaForCausalLM(config)
    refusing, complying = (torch.randint(256, (8, 16)) for _ in range(2))
    with torch.no_grad():
        means = [
            torch.stack(
                [h[:, -1].mean(0) for h in model(x, output_hidden_states=True).hidden_states]
            )
            for x in (refusing, complying)
        ]
    directions = (means[0] - means[1])[1:3].mT  # [d, 2], of two layers
    before = written(model, directions)
    ablate_(model, directions)
    after = written(model, directions)
    for name in after:
        print(f"{name:40} {before[name]:.1e} → {after[name]:.1e}")
    return after


if __name__ == "__main__":
    main()
