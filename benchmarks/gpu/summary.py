"""What a run comes to, in plain words, from its lines alone."""

from collections.abc import Iterable
from pathlib import Path

from .lines import read

OURS = ("triton", "cuda", "reference")
RIVALS = ("addmm_", "compile")
LISTED = ("ours", "addmm_ loop", "grouped", "foreach_mul_", "pinned, measured")


def write(path: Path) -> str:
    """Beside `path`, as Markdown; also returned."""
    said = text(read(path))
    path.with_suffix(".md").write_text(said + "\n")
    return said


def text(lines: list[dict]) -> str:
    ended = [f for f in lines if f.keys() >= {"seconds", "exit", "reason"}]
    by_part: dict[str, list[dict]] = {}
    for line in lines:
        if line not in ended:
            by_part.setdefault(line["part"], []).append(line)
    found = [_head(by_part.get("about", [])), _parts(ended)]
    for part, section in SECTIONS.items():
        try:
            found.append(section(by_part.get(part, [])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Parts change; what one says now must not take the others' figures along.
            why = f"{type(error).__name__}: {error}"
            found.append(f"{part}: its lines can't be summed up ({why})")
    wrong = [_wrong(f) for f in lines if "failed" in f or f.get("passed") is False]
    found.append(_bullets("Not as it should be:", wrong))
    out = [f"{f['part']}: {f['left_out']}" for f in lines if "left_out" in f]
    found.append(_bullets("Left out:", out))
    return "\n\n".join(filter(None, found))


def _head(about: list[dict]) -> str:
    found = next((f for f in about if "device" in f), {})
    named = ("torch", "triton", "cuda", "commit", "date")
    versions = ", ".join(f"{k} {found[k]}" for k in named if found.get(k))
    said = f"# {found.get('device', 'unknown device')}\n\n{versions}"
    if found.get("rehearsal"):
        said += "\n\nA rehearsal without a GPU: no figure here is a measurement."
    return said


def _parts(ended: list[dict]) -> str:
    by_end: dict[str, list[str]] = {"passed": [], "failed": [], "left out": []}
    for f in ended:
        reason = f["reason"] or "passed"
        end = next((e for e in ("passed", "left out") if reason.startswith(e)), "failed")
        by_end[end].append(f["part"])
    said = "; ".join(f"{end}: {', '.join(names)}" for end, names in by_end.items() if names)
    rows = [(f["part"], f"{float(f['seconds']):.0f} s", f["reason"] or "passed") for f in ended]
    return _table(f"{said[:1].upper()}{said[1:]}.", ("part", "took", "ended"), rows)


def _copies(lines: list[dict]) -> str:
    best = max((float(f["GBps"]["copy"]) for f in lines if "GBps" in f), default=None)
    return best and f"A copy moves {best:,.0f} GB/s at best."


def _matrices(lines: list[dict]) -> str:
    shares = [
        (f["case"], {n: float(v) for n, v in f["share"].items()}) for f in lines if "share" in f
    ]
    names = [n for n in (*OURS, *RIVALS) if any(n in share for _, share in shares)]
    best = [max((v for n, v in s.items() if n in OURS), default=0.0) for _, s in shares]
    said = "One matrix, as a share of the speed of a copy of the same size."
    for rival in RIVALS:
        met = [(b, s[rival]) for b, (_, s) in zip(best, shares, strict=True) if rival in s]
        if met:
            said += f" Ours is faster than {rival} in {sum(b > s for b, s in met)} of {len(met)}."
    rows = [(case, *(_percent(share.get(n)) for n in names)) for case, share in shares]
    return _table(said, ("case", *names), rows)


def _lists(lines: list[dict]) -> str:
    rows = []
    for f in lines:
        if "floor_ms" in f:
            times = (f["floor_ms"], *(f["ms"].get(n) for n in LISTED), f["host_us"].get("ours"))
            rows.append((f["case"], *map(_figure, times)))
    said = "All factors of a model, in ms (floor: bases and `T` read once, `T` written):"
    return _table(said, ("list", "floor", *LISTED, "host, µs"), rows)


def _counters(lines: list[dict]) -> str:
    rows = [
        (f["case"], _figure(f["over_floor"]), f"{float(f['GBps']):,.0f}")
        for f in lines
        if "over_floor" in f
    ]
    return _table("By the card's own counters:", ("case", "bytes over the least", "GB/s"), rows)


def _variants(lines: list[dict]) -> str:
    """Of each matrix the constants as they are, and the best."""
    by_matrix: dict[str, list[dict]] = {}
    for f in lines:
        if f.get("sound"):
            by_matrix.setdefault(f["case"].split(",")[0], []).append(f)
    rows = []
    for matrix, found in by_matrix.items():
        now = next((f["share"] for f in found if f["variant"] is None), None)
        best = max(found, key=lambda f: float(f["share"]))
        rows.append((matrix, _percent(now), _percent(best["share"]), best["variant"] or "as it is"))
    return _table("Constants of the Triton kernels:", ("matrix", "now", "best", "with"), rows)


def _leak(lines: list[dict]) -> str:
    found = [(float(f["error_over_pytorch"]), f) for f in lines if "error_over_pytorch" in f]
    if not found:
        return ""
    most, worst = max(found, key=lambda pair: pair[0])
    where = f"{worst['backend']}, {worst['case']}"
    return f"Largest error over PyTorch's own: {most:.2f} ({where}), of {len(found)} cases."


def _step(lines: list[dict]) -> str:
    rows = [
        (f["case"], _figure(f["ms"]["plain"]), _figure(f["ms"]["guarded"]))
        + (f"{float(f['over_plain']['guarded']):.3f}", f"{float(f['spread']):.1%}")
        for f in lines
        if "over_plain" in f
    ]
    head = ("a step", "plain, ms", "guarded, ms", "over plain", "spread")
    return _table("A guarded training step:", head, rows)


def _orthonormalize(lines: list[dict]) -> str:
    rows = []
    for f in lines:
        if "orthogonality" in f:
            over = (_figure(f["over"].get(n)) for n in ("qr loop", "qr batch"))
            error = f"{float(f['orthogonality']):.1e}"
            rows.append((f["case"], f.get("backend"), _figure(f["ms"]), *over, error))
    head = ("matrices", "by", "ms", "a loop of qr takes, times", "a batch", "‖QᵀQ − I‖")
    return _table("Orthonormalisation:", head, rows)


SECTIONS = {
    "copies": _copies,
    "matrices": _matrices,
    "lists": _lists,
    "counters": _counters,
    "variants": _variants,
    "leak": _leak,
    "step": _step,
    "orthonormalize": _orthonormalize,
}


def _wrong(line: dict) -> str:
    what = line.get("case") or line.get("what")
    where = f"{line['part']}, {what}" if what else line["part"]
    return f"{where}: {line.get('failed') or 'not passed'}"


def _percent(value) -> str:
    return "" if value is None else f"{float(value):.0%}"


def _figure(value) -> str:
    return "" if value is None else f"{float(value):.3g}"


def _bullets(said: str, items: Iterable[str]) -> str:
    listed = "\n".join(f"- {item}" for item in items)
    return f"{said}\n\n{listed}" if listed else ""


def _table(said: str, head: tuple, rows: list[tuple]) -> str:
    """Nothing where there are no rows."""
    lines = [head, ("---",) * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{said}\n\n{table}" if rows else ""
