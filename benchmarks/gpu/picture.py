"""`roofline.png`, from the lines alone: how much of what the memory gives each case reaches."""

from pathlib import Path

from .inside import Inside, LeftOut
from .lines import read

OURS = {"triton": "#2a6f97", "cuda": "#e07a2f", "ours": "#2a6f97", "reference": "#b0b7bd"}
OTHERS = {
    "addmm_": "#111111",
    "compile": "#9b4dca",
    "addmm_ loop": "#111111",
    "grouped": "#9b4dca",
    "foreach_mul_": "#4c9f70",
}
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
PANELS = {
    "matrices": "One matrix: share of the speed of a copy of it",
    "lists": "All factors of a model: bases and T read once, T written, over the time taken",
}
INCHES = 0.21  # a bar
GAP = 0.5  # bars between two cases
REACH = 1.1  # of the axis

Case = tuple[str, dict[str, float], dict[str, float]]  # its name, our shares, the others'


def measure(inside: Inside) -> None:
    try:
        inside.add(drawn=draw(inside.out).name)
    except ValueError as nothing:
        raise LeftOut(str(nothing)) from None


def draw(path: Path) -> Path:
    """Beside `path`, the lines of `gpu_check.py`, on whatever machine.

    Raises:
        ValueError: the lines hold no figure of a matrix or a list.
    """
    lines = read(path)
    panels = {title: found for part, title in PANELS.items() if (found := _cases(lines, part))}
    if not panels:
        raise ValueError(f"{path.name} has nothing to draw; run --part matrices or --part lists")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [sum(len(ours) + GAP for _, ours, _ in cases) for cases in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(8.5, INCHES * sum(bars) + 1.1 * len(panels) + 0.4),
        height_ratios=bars,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, cases) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, title, cases)
    figure.suptitle(_title(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.savefig(beside(path), dpi=160)
    pyplot.close(figure)
    return beside(path)


def beside(path: Path) -> Path:
    return path.with_name("roofline.png")


def _title(lines: list[dict]) -> str:
    about = next((f for f in lines if f.get("part") == "about" and "torch" in f), {})
    name = f"{about.get('device')}, torch {about.get('torch')}, Triton {about.get('triton')}"
    return f"{name}: a rehearsal, no measurement" if about.get("rehearsal") else name


def _cases(lines: list[dict], part: str) -> list[Case]:
    found = []
    for line in sorted((f for f in lines if f.get("part") == part and "share" in f), key=_order):
        shares = {name: float(v) for name, v in line["share"].items()}
        ours = {name: v for name, v in shares.items() if name in OURS}
        others = {name: v for name, v in shares.items() if name in OTHERS and v == v}
        found.append((_label(line), ours, others))
    return found


def _order(line: dict) -> tuple:
    """What is alike stands together; lists stay as they came."""
    if "tensors" in line:
        return ()
    return (line["side"] == "left", line["dtype"], line["shape"], line["k"])


def _label(line: dict) -> str:
    if "tensors" in line:
        return f"{line['tensors']} of {line['case']}"
    m, n = line["shape"]
    return f"{line['side']}  {m:,} × {n:,}  {DTYPES[line['dtype']]}  k {line['k']}"


def _panel(axis, title: str, cases: list[Case]) -> None:
    place, ticks = 0.0, []
    for _, ours, others in cases:
        first = place
        for backend, share in ours.items():
            axis.barh(place, min(share, REACH), 0.84, color=OURS[backend], zorder=2)
            _say(axis, share, place)
            place += 1
        for other, share in others.items():
            ends = (first - 0.5, place - 0.5)
            axis.vlines(min(share, REACH), *ends, color="white", lw=4, zorder=3)
            axis.vlines(min(share, REACH), *ends, color=OTHERS[other], lw=2, zorder=4)
        ticks.append((first + place - 1) / 2)
        place += GAP
    axis.set_yticks(ticks, [label for label, _, _ in cases], fontsize=8)
    axis.set_ylim(place - GAP, -0.8)
    axis.axvline(1, color="#444444", lw=1.2, zorder=1)
    axis.set_xlim(0, REACH)
    shown = [0, 0.25, 0.5, 0.75, 1]
    axis.set_xticks(shown, [f"{x:.0%}" for x in shown], fontsize=8)
    axis.grid(axis="x", color="#e6e6e6", zorder=0)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=9)
    _legend(axis, cases)


def _legend(axis, cases: list[Case]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [n for n in OURS if any(n in ours for _, ours, _ in cases)]
    ticks = [n for n in OTHERS if any(n in others for _, _, others in cases)]
    handles = [Patch(color=OURS[n], label=n) for n in bars]
    mark = {"ls": "", "marker": "|", "ms": 10, "mew": 2}
    handles += [Line2D([], [], color=OTHERS[n], label=n, **mark) for n in ticks]
    place = {"loc": "upper right", "bbox_to_anchor": (1, 0), "borderaxespad": 1.8}
    axis.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, **place)


def _say(axis, share: float, place: float) -> None:
    """The figure at the foot of its bar, where no tick stands."""
    if share != share:
        said, colour = "not a number", "#a00000"
    else:
        said = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
        colour = "white" if share >= 0.1 else "#333333"
    x = 0.006 if share >= 0.1 or share != share else share + 0.006
    axis.text(x, place, said, va="center", fontsize=7, color=colour, zorder=5)
