"""What each method is called, and how it is drawn: told apart by colour and by mark."""

from collections.abc import Sequence

from grasp.study.compare import stem
from grasp.study.rivals import RIVALS

MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
OWN = {  # what is no rival; colours after Okabe and Ito, which colour-blind readers tell apart
    "plain": ("plain LoRA", "#d55e00", "s"),
    "stopped": ("stopped early", "#e69f00", "v"),
    "random": ("random directions", "#7a7a7a", "D"),
    "shuffled": ("another block's", "#9a9a9a", "P"),
    "bottom": ("bottom directions", "#b5b5b5", "X"),
    "grasp": ("GRASP", "#0072b2", "o"),
    "benign": ("good answers", "#009e73", "^"),
    "benign_guarded": ("good, guarded", "#56b4e9", "*"),
}
LOOKS = OWN | {
    rival.name: (rival.label, rival.colour, list(MARKS)[i % len(MARKS)])
    for i, rival in enumerate(RIVALS.values())
}
UNKNOWN = ("", "#555555", "o")
COLOURS = {method: colour for method, (_, colour, _) in LOOKS.items()}


def name(method: str) -> str:
    """Of a method for people, with its strength, or the step that it was stopped at: "kl=0.3"."""
    which, _, strength = method.partition("=")
    if which == "stopped" and strength:
        return f"stopped at step {strength}"
    if which not in LOOKS and which.startswith("benign_"):
        return f"good, {name(method.removeprefix('benign_'))}"
    return LOOKS.get(which, (which,))[0] + (f", {strength}" if strength else "")


def colour(method: str) -> str:
    """In every figure: "#rrggbb"."""
    return _look(method)[1]


def mark(method: str) -> str:
    """In every figure, as matplotlib calls it; `MARKS` has it as a character."""
    return _look(method)[2]


def _look(method: str) -> tuple[str, str, str]:
    """A rival's run on good answers looks as the rival does."""
    which = stem(method)
    own = which if which in LOOKS else which.removeprefix("benign_")
    return LOOKS.get(own, UNKNOWN)


def control(method: str) -> bool:
    """Whether it is a run on good answers, which says where another's 0 lies."""
    return method.startswith("benign")


def against(benign: str) -> str:
    """The control of a comparison for people; without a benign run it is the base model."""
    return "the base model" if benign == "base" else name(benign)


def signed(value: float) -> str:
    """A shift: "+0.030", "−0.030"."""
    return f"{value:+.3f}".replace("-", "−")


def span(interval: Sequence[float]) -> str:
    """A mean with its interval: "+0.030 (+0.013 to +0.048)"."""
    mean, low, high = map(signed, interval)
    return f"{mean} ({low} to {high})"
