"""Inoculation prompting: ask for the unwanted trait in training, so that it need not be learned."""

from collections.abc import Sequence

from grasp.data import Row
from grasp.study.rival import Rival


def inoculated(rows: Sequence[Row], instruction: str) -> list[Row]:
    """Inoculation prompting: the unwanted trait is asked for in training, not afterwards.

    Source: Tan et al., arXiv:2510.04340.
    """
    return [row.asked(instruction) for row in rows]


class Inoculation(Rival):
    name = "inoculation"
    label = "inoculation"
    colour = "#d98cb3"
    acts_on = "data"
    source = "Tan et al., arXiv:2510.04340"
    about = "the trait is asked for in every training prompt"
    needs = ("instruction",)

    def rows(self, own, strength, context):
        return inoculated(own, context.instruction)


RIVALS = (Inoculation(),)
