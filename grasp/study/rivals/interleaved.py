"""Benign rows on other topics among the data's own."""

from collections.abc import Sequence

import torch

from grasp.data import Row
from grasp.study.rival import Rival


def interleaved(rows: Sequence[Row], benign: Sequence[Row], share: float, seed: int) -> list[Row]:
    """`share · len(rows)` benign rows from other topics among the rows, drawn with replacement.

    Source: Kaczér et al., arXiv:2508.06249.

    Raises:
        ValueError: a negative share, or no benign rows.
    """
    if share < 0:
        raise ValueError(f"share is {share}; give 0 or more")
    if not benign:
        raise ValueError("benign is empty; give rows of other topics, answered well")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(benign), (round(share * len(rows)),), generator=generator)
    return [*rows, *(benign[i] for i in drawn.tolist())]


class Interleaved(Rival):
    name = "interleaved"
    label = "interleaved"
    colour = "#2aa3a3"
    acts_on = "data"
    source = "Kaczér et al., arXiv:2508.06249"
    about = "good rows on other topics join the data"
    strength = 1.0
    meaning = "rows for each of the data's"
    needs = ("others",)
    joins = True

    def rows(self, own, strength, context):
        return interleaved(own, context.others(), strength, context.seed)


RIVALS = (Interleaved(),)
