"""Whoever steps, and whatever is shown or kept besides, the guarantee is the same."""

import pytest
import torch

from tests.models import batch, build, train, trainable, with_lora
from tests.test_guarantee import FORMS, deltas, guarded, through


class Lookahead(torch.optim.Optimizer):
    """Steps an optimizer, and every third time goes back half of the way: Zhang et al. 2019."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                slow = state.setdefault("slow_param", p.detach().clone())
                if self.count % 3 == 0:
                    slow += 0.5 * (p - slow)
                    p.copy_(slow)


def test_what_an_optimizer_shows_for_evaluation_is_held_too():
    schedulefree = pytest.importorskip("schedulefree")
    model = with_lora(build())
    optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=1e-2)
    optimizer.train()
    before = deltas(model)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 20)
        optimizer.eval()
    assert through(guard, before, deltas(model)) <= 1e-6


class SAM(torch.optim.Optimizer):
    """Climbs, then steps from there: Foret et al., arXiv:2010.01412, called as its authors do."""

    def __init__(self, parameters, base):
        self.base = base
        super().__init__(parameters, {})

    @torch.no_grad()
    def climb(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["was"] = p.detach().clone()
            p += 0.01 * p.grad / (p.grad.norm() + 1e-9)

    @torch.no_grad()
    def descend(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["was"])
        self.base.step()


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_that_is_stepped_by_other_names(form):
    model = with_lora(build())
    optimizer = SAM(trainable(model), torch.optim.AdamW(trainable(model), lr=1e-2))
    before = deltas(model)
    with guarded(model, optimizer, form) as guard:
        for i in range(6):
            for move in (optimizer.climb, optimizer.descend):
                model(**batch(seed=i)).loss.backward()
                move()
                model.zero_grad()
        assert guard.steps == 6 and max(m["rank"] for m in guard.leak().values()) >= 3
    assert through(guard, before, deltas(model)) <= 1e-6
    assert guard.certificate()["holds"]


def test_no_step_seen_is_not_certified():
    model = with_lora(build())
    with pytest.warns(UserWarning, match="no step of a torch optimizer was seen"):
        with guarded(model, None) as guard:
            model(**batch()).loss.backward()
            with torch.no_grad():
                for p in trainable(model):
                    p -= 0.1 * p.grad
    assert guard.certificate()["holds"] is False


@pytest.mark.parametrize("start", [{}, {"init_lora_weights": "pissa"}])
def test_an_average_that_began_before_the_bases_is_held_by_one_call(start):
    model = with_lora(build(), **start)
    before = deltas(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    kept = []
    with guarded(model, optimizer) as guard:
        for i in range(10):
            model(**batch(seed=i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append([p.detach().clone() for p in trainable(model)])
    with torch.no_grad():
        for p, values in zip(trainable(model), zip(*kept, strict=True), strict=True):
            p.copy_(torch.stack(values).mean(0))
    assert not guard.certificate()["holds"] and through(guard, before, deltas(model)) > 1e-5
    guard.pin()
    assert guard.certificate()["holds"] and through(guard, before, deltas(model)) < 3e-6


def test_two_optimizers_count_as_one_step():
    model = with_lora(build())
    named = dict(model.named_parameters())
    first, second = (
        torch.optim.AdamW([p for n, p in named.items() if part in n], lr=1e-2)
        for part in ("lora_A", "lora_B")
    )
    before = deltas(model)
    with guarded(model, first) as guard:
        for i in range(6):
            model(**batch(seed=i)).loss.backward()
            first.step()
            second.step()
            model.zero_grad()
        assert guard.steps == 6
    assert through(guard, before, deltas(model)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused(form):
    model = with_lora(build())
    own = {p: torch.optim.AdamW([p], lr=1e-3) for p in trainable(model)}
    for p in own:
        p.register_post_accumulate_grad_hook(lambda p: own[p].step())
    with guarded(model, None, form), pytest.raises(RuntimeError, match="inside the backward pass"):
        model(**batch()).loss.backward()


def test_a_fresh_optimizer_goes_on_where_the_last_one_was():
    model = with_lora(build())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = deltas(model)
    with guarded(model, optimizer) as guard:
        train(model, optimizer, 2)
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 6)
        assert guard.steps >= 7
    assert through(guard, before, deltas(model)) <= 1e-6
    assert max(m["rank"] for n, m in guard.leak().items() if "lora_B" in n) == 3


@pytest.mark.parametrize("form", ["both", "given"])
@pytest.mark.parametrize("count", [6, 7])
def test_an_optimizer_around_another_is_held_after_its_own_move(form, count):
    model = with_lora(build())
    optimizer = Lookahead(torch.optim.AdamW(trainable(model), lr=1e-2))
    before = deltas(model)
    with guarded(model, optimizer, form) as guard:
        train(model, optimizer, count)
        assert guard.steps == count
    assert through(guard, before, deltas(model)) <= 1e-6
    for p in trainable(model):
        with torch.no_grad():
            p.copy_(optimizer.state[p]["slow_param"])
    assert through(guard, before, deltas(model)) <= 1e-6
