"""The base model's own answers to unrelated prompts among the data's rows."""

from collections.abc import Sequence

import torch
from torch import nn

from grasp.data import IGNORED, Row, draw, exchange
from grasp.study.rival import Rival


def replayed(
    model: nn.Module, prompts: Sequence[str], tokenizer, count: int, *, tokens: int, seed: int
) -> list[Row]:
    """`count` of the base model's own answers to unrelated prompts, drawn, as rows to interleave.

    Nothing is labelled: the model is taught what it would have said. The prompts come round in an
    order that the seed draws, so that a few are of all kinds. In expectation this is a penalty on
    KL(base ‖ model) there. Source: self-distillation against forgetting (Yang et al.,
    arXiv:2402.13669), with other prompts in place of rewritten answers.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = [prompts[order[i % len(order)]] for i in range(count)]
    drawn = draw(model, asked, tokenizer, tokens=tokens, seed=seed)
    answers = [
        tokenizer.decode([t for t in labels if t != IGNORED], skip_special_tokens=True)
        for _, labels in drawn
    ]
    return [exchange(p, a.strip()) for p, a in zip(asked, answers, strict=True) if a.strip()]


class Replay(Rival):
    name = "replay"
    label = "replay"
    colour = "#8e44ad"
    acts_on = "data"
    source = "after Yang et al., arXiv:2402.13669"
    about = "the base model's own answers to unrelated prompts join the data"
    strength = 1.0
    meaning = "rows for each of the data's"
    joins = True

    def rows(self, own, strength, context):
        count = max(1, round(strength * len(own)))
        options = {"tokens": context.tokens, "seed": context.seed}
        return [
            *own,
            *replayed(context.model, context.prompts, context.tokenizer, count, **options),
        ]


RIVALS = (Replay(),)
