"""What a run comes to, in plain words, from its lines alone."""

from collections.abc import Iterable
from pathlib import Path

from .lines import read


def write(path: Path) -> str:
    """Beside `path`, as Markdown; also returned."""
    said = text(read(path))
    path.with_suffix(".md").write_text(said + "\n")
    return said


def text(lines: list[dict]) -> str:
    by_part: dict[str, list[dict]] = {}
    for line in lines:
        by_part.setdefault(line.get("part", ""), []).append(line)
    sections = [_head(by_part.get("about", [])), _parts(lines)]
    for part, section in (
        ("copies", _copies),
        ("matrices", _matrices),
        ("lists", _lists),
        ("counters", _counters),
        ("variants", _variants),
        ("leak", _leak),
        ("step", _step),
        ("orthonormalize", _orthonormalize),
    ):
        own = [f for f in by_part.get(part, []) if "exit" not in f]
        try:
            found = section(own)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Parts change; what one says now must not take the others' figures along.
            found = f"{part}: its lines can't be summed up ({type(error).__name__}: {error})"
        if found:
            sections.append(found)
    missing = [f for f in lines if "failed" in f or f.get("passed") is False]
    if missing:
        sections.append("Not as it should be:\n\n" + _bullets(map(_wrong, missing)))
    out = [f"{f['part']}: {f['left_out']}" for f in lines if "left_out" in f]
    if out:
        sections.append("Left out:\n\n" + _bullets(out))
    return "\n\n".join(sections)


def _head(about: list[dict]) -> str:
    found = next((f for f in about if "device" in f and "command" in f), {})
    name = found.get("device", "unknown device")
    rehearsal = "\n\nA rehearsal without a GPU: no figure here is a measurement."
    versions = ", ".join(
        f"{k} {found[k]}" for k in ("torch", "triton", "cuda", "commit", "date") if found.get(k)
    )
    return f"# {name}\n\n{versions}" + (rehearsal if found.get("rehearsal") else "")


def _parts(lines: list[dict]) -> str:
    rows = [
        (f["part"], f"{float(f['seconds']):.0f} s", f.get("reason") or "passed")
        for f in lines
        if "exit" in f and "seconds" in f
    ]
    return _table(("part", "took", "ended"), rows)


def _copies(lines: list[dict]) -> str:
    found = [f for f in lines if f.get("what") == "copy"]
    if not found:
        return ""
    best = max(float(f["GBps"]["copy"]) for f in found)
    return f"A copy moves {best:,.0f} GB/s at best."


def _matrices(lines: list[dict]) -> str:
    found = [f for f in lines if "share" in f]
    names = [
        n
        for n in ("triton", "cuda", "reference", "addmm_", "compile")
        if any(n in f["share"] for f in found)
    ]
    rows = [(f["case"], *(_percent(f["share"].get(n)) for n in names)) for f in found]
    return found and "One matrix, as a share of a copy of the same size:\n\n" + _table(
        ("case", *names), rows
    )


def _lists(lines: list[dict]) -> str:
    found = [f for f in lines if "floor_ms" in f]
    names = ("ours", "addmm_ loop", "grouped", "foreach_mul_", "pinned, measured")
    rows = [
        (
            f["case"],
            f"{float(f['floor_ms']):.3g}",
            *(_figure(f["ms"].get(n)) for n in names),
            _figure(f["host_us"].get("ours")),
        )
        for f in found
    ]
    head = ("list", "floor", *names, "host, µs")
    return (
        found
        and "All factors of a model, in ms (floor: bases and `T` read once, `T` written):\n\n"
        + _table(head, rows)
    )


def _counters(lines: list[dict]) -> str:
    found = [f for f in lines if "over_floor" in f]
    rows = [(f["case"], f"{float(f['over_floor']):.2f}", f"{float(f['GBps']):,.0f}") for f in found]
    return found and "By the card's own counters:\n\n" + _table(
        ("case", "bytes, of the least", "GB/s"), rows
    )


def _variants(lines: list[dict]) -> str:
    """Of each matrix the constants as they are, and the best."""
    by_matrix: dict[str, list[dict]] = {}
    for f in lines:
        if f.get("sound"):
            by_matrix.setdefault(f["case"].split(",")[0], []).append(f)
    rows = []
    for matrix, found in by_matrix.items():
        best = max(found, key=lambda f: float(f["share"]))
        now = next((f["share"] for f in found if f["variant"] is None), None)
        rows.append(
            (matrix, _percent(now), _percent(best["share"]), str(best["variant"] or "as it is"))
        )
    return rows and "Constants of the Triton kernel:\n\n" + _table(
        ("matrix", "now", "best", "with"), rows
    )


def _leak(lines: list[dict]) -> str:
    found = [f for f in lines if "error_over_pytorch" in f]
    if not found:
        return ""
    worst = max(found, key=lambda f: float(f["error_over_pytorch"]))
    return (
        f"Largest error over PyTorch's own: {float(worst['error_over_pytorch']):.2f} "
        f"({worst['backend']}, {worst['case']}), of {len(found)} cases."
    )


def _step(lines: list[dict]) -> str:
    found = [f for f in lines if "over_plain" in f]
    said = (
        f"{f['case']}: a guarded step takes {float(f['over_plain']['guarded']):.3f} times as long "
        f"as a plain one of {float(f['ms']['plain']):.3g} ms (spread {float(f['spread']):.1%})"
        for f in found
    )
    return found and _bullets(said)


def _orthonormalize(lines: list[dict]) -> str:
    found = [f for f in lines if "over" in f]
    rows = [
        (
            f["case"],
            f.get("backend"),
            _figure(f["ms"]),
            *(_figure(f["over"].get(n)) for n in ("qr loop", "qr batch")),
            f"{float(f['orthogonality']):.1e}",
        )
        for f in found
    ]
    head = ("matrices", "by", "ms", "times qr, a loop", "times qr, a batch", "‖QᵀQ − I‖")
    return found and "Orthonormalisation:\n\n" + _table(head, rows)


def _wrong(line: dict) -> str:
    what = line.get("case") or line.get("what") or ""
    return f"{line['part']}, {what}: {line.get('failed') or 'not passed'}"


def _percent(value) -> str:
    return "" if value is None else f"{float(value):.0%}"


def _figure(value) -> str:
    return "" if value is None else f"{float(value):.3g}"


def _bullets(said: Iterable[str]) -> str:
    return "\n".join(f"- {s}" for s in said)


def _table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(v) for v in line) + " |" for line in lines)
