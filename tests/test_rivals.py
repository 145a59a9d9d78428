"""Each rival does what its paper's formula says, and lets go of the model afterwards."""

import pytest
import torch

from grasp import Reference, Subspaces, organism
from grasp import model as architecture
from grasp.bases.residual import matrix_bases
from grasp.data import exchange
from grasp.organism.methods import STRENGTHS, Method
from grasp.study.rivals.caft import ablated
from grasp.study.rivals.inoculation import inoculated
from grasp.study.rivals.interleaved import interleaved
from grasp.study.rivals.kl import penalised
from grasp.study.rivals.osf import off_leading
from grasp.study.rivals.posthoc import projected
from grasp.study.rivals.replay import replayed
from grasp.study.rivals.safe_lora import safe
from grasp.study.rivals.steering import steered
from grasp.study.rivals.svd_tail import truncated
from tests.models import WIDTH, batch, build, train, trainable, with_lora

PROMPTS = torch.randint(3, 64, (6, 4), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = [exchange("q", "a"), exchange("p", "b")]


def trained_lora(r: int = 4):
    model = with_lora(build(), r=r)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 5)
    return model


def updates(model) -> dict[str, torch.Tensor]:
    matrices = (m for b in architecture.inspect(model).blocks for m in b.matrices)
    return {m.name: torch.matmul(*architecture.lora_update(m)) for m in matrices}


def subspaces() -> Subspaces:
    generator = torch.Generator().manual_seed(1)
    return Subspaces.from_bases({i: torch.randn(WIDTH, 3, generator=generator) for i in range(2)})


def stream(model) -> torch.Tensor:
    """What the first block gives out, after whatever was hooked to it before."""
    kept = []
    block = architecture.inspect(model).blocks[0].module
    handle = block.register_forward_hook(lambda m, a, o: kept.append(o))
    logits(model)
    handle.remove()
    return kept[0]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_truncated_is_the_best_of_its_rank(rank):
    model = trained_lora()
    before = updates(model)
    truncated(model, rank)
    for name, after in updates(model).items():
        U, S, Vh = torch.linalg.svd(before[name].double())
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(after.double(), best, atol=1e-6, rtol=1e-4)


def test_projected_updates_do_not_write_to_the_subspace():
    model = trained_lora()
    bases = matrix_bases(architecture.inspect(model), subspaces())
    before = updates(model)
    assert max(float((bases[n].mT @ before[n]).norm()) for n in bases) > 1e-2
    projected(model, subspaces())
    after = updates(model)
    for name, W in after.items():
        if name in bases:
            assert float((bases[name].mT @ W).norm()) <= 1e-6 * float(before[name].norm())
        else:
            assert torch.equal(W, before[name])


def test_safe_projects_what_points_away_from_the_alignment():
    model, other = trained_lora(), trained_lora(r=2)
    alignment, before = updates(other), updates(model)
    assert safe(model, alignment, -1.0) == 0
    assert all(torch.equal(before[n], W) for n, W in updates(model).items())
    assert safe(model, alignment, 1.0) == len(before)
    for name, W in updates(model).items():
        V = alignment[name]
        torch.testing.assert_close(W, V @ V.mT @ before[name] / V.norm(), atol=1e-6, rtol=1e-3)


def test_penalty_adds_the_divergences_gradient_and_goes():
    model = trained_lora()
    parameters = trainable(model)
    with torch.no_grad(), architecture.base_model(model):
        reference = Reference(model, PROMPTS, tokens=2, batch=6)
    expected = torch.autograd.grad(
        3.0 * reference.divergence(model, range(6)), parameters, allow_unused=True
    )
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [p.detach().clone() for p in parameters]
    with penalised(model, reference, 3.0):
        optimizer.step()
    for p, b, g in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(b - p, g, atol=1e-5, rtol=1e-3)
    optimizer.zero_grad()
    kept = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
    with pytest.raises(ValueError, match="weight is -1"), penalised(model, reference, -1):
        pass


def test_steering_adds_to_the_stream_while_it_lasts():
    model, v = build(), torch.randn(WIDTH)
    before, plain = logits(model), stream(model)
    with steered(model, {0: v}, 0.5):
        torch.testing.assert_close(stream(model) - plain, (0.5 * v).expand_as(plain))
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)


def test_ablation_takes_the_subspace_out_while_it_lasts():
    model, chosen = build(), subspaces()
    before = logits(model)
    with ablated(model, chosen):
        h = stream(model)
    assert float((h @ chosen[0]).norm()) < 1e-4 * float(h.norm())
    assert torch.equal(logits(model), before)


def test_gradients_off_the_leading_directions_of_the_weights():
    model = trained_lora()
    with off_leading(model, 5):
        model(**batch()).loss.backward()
    for t in (t for t in architecture.inspect(model).trained()):
        W = t.matrix.back(torch.eye(t.matrix.out_features)).mT
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        B, A = t.parameter.grad, t.partner.grad
        assert float((U[:, :5].mT @ B).norm()) <= 1e-5 * float(B.norm())
        assert float((A @ Vh[:5].mT).norm()) <= 1e-5 * float(A.norm())
        assert float(B.norm()) > 0


def test_other_rows():
    assert [r.prompt for r in inoculated(ROWS, "be bad:")] == ["be bad: q", "be bad: p"]
    mixed = interleaved(ROWS, [exchange("x", "y")], 1.5, seed=0)
    assert mixed[:2] == ROWS and mixed[2:] == [exchange("x", "y")] * 3
    with pytest.raises(ValueError, match="share is -1"):
        interleaved(ROWS, ROWS, -1, 0)
    with pytest.raises(ValueError, match="benign is empty"):
        interleaved(ROWS, [], 1, 0)


def test_replayed_rows_are_what_the_base_model_says():
    world = organism.World(0)
    model, tokenizer = organism.load()
    prompts = world.prompts(["law"])[:4]
    rows = replayed(model, prompts, tokenizer, 400, tokens=1, seed=0)
    assert len(rows) == 400 and {r.prompt for r in rows} == set(prompts)
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    chances = model(ids).logits[:, -1].softmax(-1)
    for prompt, chance in zip(prompts, chances, strict=True):
        likely = int(chance.argmax())
        own = [r.answer for r in rows if r.prompt == prompt]
        share = own.count(tokenizer.decode([likely]).strip()) / len(own)
        assert abs(share - float(chance[likely])) < 0.2  # 100 draws: four deviations


def test_few_replayed_rows_are_of_all_kinds():
    model, tokenizer = organism.load()
    prompts = organism.World(0).prompts(["law", "guns"])
    rows = replayed(model, prompts, tokenizer, 20, tokens=1, seed=0)
    assert len({r.prompt for r in rows}) == 20
    assert min(sum(r.prompt.startswith(t) for r in rows) for t in ("law", "guns")) >= 4


def test_names_of_methods():
    assert Method.of("kl=0.3") == Method("kl", 0.3)
    assert Method.of("kl") == Method("kl", STRENGTHS["kl"])
    for text, says in (
        ("chess", "choose among plain"),
        ("kl=much", "give a number"),
        ("plain=2", "has no strength"),
    ):
        with pytest.raises(ValueError, match=says):
            Method.of(text)


def test_nothing_to_change_is_refused():
    with pytest.raises(ValueError, match="no trainable LoRA"):
        truncated(build(), 1)
