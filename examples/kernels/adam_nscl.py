"""Adam-NSCL's update projection: a second task is learnt in the null space of the first's inputs.

    ΔW ← ΔW − (ΔW V) Vᵀ      of what the optimizer did, not of the gradient: Adam rescales that

After Wang et al., arXiv:2103.07113. python examples/kernels/adam_nscl.py
"""

import torch
from torch import Tensor, nn

import grasp_kernels as gk


@torch.no_grad()
def inputs_of(model: nn.Sequential, x: Tensor) -> dict[nn.Linear, Tensor]:
    """For each layer a basis `[d_in, k]` of what comes in on a task: the rest is its null space."""
    bases = {}
    for layer in model:
        if isinstance(layer, nn.Linear):
            _, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
            bases[layer] = Vh[S > 1e-5 * S[0]].mT.float().contiguous()
        x = layer(x)
    return bases


class InNullSpace:
    """An optimizer whose change of each weight lies off a basis of its inputs.

    `C = W₀ V` pins W V: the update is projected with all that came before it, no copy of W is kept,
    and the rounding of many steps does not add up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, bases: dict[nn.Linear, Tensor]):
        self.optimizer, self.zero_grad = optimizer, optimizer.zero_grad
        weights = [layer.weight.data for layer in bases]
        Cs = [W @ V for W, V in zip(weights, bases.values(), strict=True)]
        self.project_ = gk.Projector(weights, list(bases.values()), Cs, check=True)

    def step(self) -> None:
        self.optimizer.step()
        self.project_()


def loss(model: nn.Module, task: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(task[0]), task[1])


def train(optimizer, model: nn.Module, task: tuple[Tensor, Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, task).backward()
        optimizer.step()


def main(steps: int = 100) -> dict[str, tuple[float, float, float, float]]:
    """By method: the loss on task 1 before and after task 2, that on task 2, and ‖ΔW V‖ / ‖ΔW‖."""
    found = {}
    for name in ("Adam", "Adam-NSCL"):
        torch.manual_seed(0)
        layers = nn.Linear(48, 64, bias=False), nn.Tanh(), nn.Linear(64, 4, bias=False)
        model = nn.Sequential(*layers)
        tasks = [(torch.randn(40, 12) @ torch.randn(12, 48) / 4, torch.randn(40, 4)) for _ in "12"]
        train(torch.optim.Adam(model.parameters(), lr=3e-3), model, tasks[0], steps)
        before, bases = float(loss(model, tasks[0]).detach()), inputs_of(model, tasks[0][0])
        starts = {m: m.weight.detach().double() for m in bases}
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        wrapped = InNullSpace(optimizer, bases) if name == "Adam-NSCL" else optimizer
        train(wrapped, model, tasks[1], steps)
        moved = {m: m.weight.detach() - W for m, W in starts.items()}
        through = max(float((D @ bases[m].double()).norm() / D.norm()) for m, D in moved.items())
        found[name] = before, *(float(loss(model, t).detach()) for t in tasks), through
        told = "{}: loss of task 1 {:.2g} → {:.2g}, of task 2 {:.2g}; ΔW on task 1's inputs {:.1e}"
        print(told.format(name, *found[name]))
    return found


if __name__ == "__main__":
    main()
