"""What is predicted of kernels is read off their code, and their code spills nothing."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from grasp.files import read_json
from tests.aot import CSRC, ROOT, nvcc, resources
from tests.issue_model import (
    Latency,
    disassembled,
    nest,
    parsed,
    played,
    units,
    widths,
)
from tests.static_model import CHIPS, Named, Resources, Work, longest, predicted, slots

TRITON = pytest.importorskip("triton")
NEAR = Latency(memory=700, l2=280)


def sass(*lines, name="kernel"):
    """As cuobjdump writes it, from `(text, stall, sets, reads, waits)`, 16 bytes apart."""
    out = [f"\t\tFunction : {name}"]
    for n, (text, stall, sets, reads, waits) in enumerate(lines):
        control = (stall | sets << 5 | reads << 8 | waits << 11) << 41
        out.append(f"        /*{16 * n:04x}*/                   {text} ;   /* 0x{n:016x} */")
        out.append(f"                                                /* 0x{control:016x} */")
    return "\n".join(out)


def code(*lines):
    filled = ((*line, *(1, 7, 7, 0)[len(line) - 1 :]) for line in lines)
    return parsed(sass(*filled))["kernel"]


def test_reads_what_the_assembler_wrote():
    text = sass(("@!P0 LDG.E.128 R4, [R2.64]", 3, 2, 7, 0), ("FADD R0, R4, R5", 15, 7, 1, 0b100))
    load, add = parsed(text + "\n" + sass(("EXIT", 5, 7, 7, 0), name="other"))["kernel"]
    assert (load.op, load.wide, load.stall, load.sets, load.reads, load.waits) == (
        *("LDG.E.128", 16, 3, 2, 7, 0),
    )
    assert (add.op, add.stall, add.sets, add.reads, add.waits) == ("FADD", 15, 7, 1, 4)


def test_finds_loops_inside_loops_and_no_code_set_aside():
    whole = nest(
        code(
            ("MOV R0, R1",),
            ("LDS R2, [R0]",),  # 0x10: outer
            ("HMMA.16816.F32 R4, R4, R6, R8",),  # 0x20: inner
            ("@P0 BRA 0x20",),
            ("STG.E.64 [R2.64], R4",),  # 0x40: after it, and inside too
            ("@P2 BRA 0x40",),
            ("@P1 BRA 0x10",),
            ("EXIT",),
            ("NANOSLEEP 0x20",),
            ("BRA 0x10",),  # from behind the end
        )
    )
    (outer,) = whole.inner
    inner, last = outer.inner
    assert [i.at for i in inner.code] == [0x20, 0x30]
    assert [i.op for i in last.code] == ["STG.E.64", "BRA"]
    assert [i.op for i in outer.own] == ["LDS", "BRA"]
    assert inner.has("HMMA") and inner.has("!STG") and not inner.has("STG|LDG")
    assert widths(last.code) == {"stores": {"8": 1}}


def test_a_load_that_is_waited_for_costs_its_latency():
    waits = code(("LDG.E R0, [R2.64]", 1, 0), ("FADD R1, R0, R1", 4, 7, 7, 1))
    assert played(waits, NEAR).cycles == 280 + 4
    assert played(waits, Latency(700, 500)).cycles == 500 + 4
    goes_on = code(("LDG.E R0, [R2.64]", 1, 0), ("FADD R1, R3, R1", 4))
    assert played(goes_on, NEAR).cycles == 5


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_copies_begun_earlier_hide_their_latency(kept):
    """`kept` groups may stay on their way: an iteration's wait is for the one that many before."""
    copies = code(
        ("LDGSTS.E.BYPASS.128 [R0], [R2.64]",),
        ("LDGDEPBAR",),
        (f"DEPBAR.LE SB0, {kept:#x}",),
    )
    found = played(copies, NEAR, rounds=400)
    assert found.cycles == pytest.approx(702 / (kept + 1), rel=0.02)
    assert found.in_flight == 512 * (kept + 1)


def test_units_are_held_by_what_goes_through_them():
    used = units(
        code(
            ("LDSM.16.M88.4 R0, [R8]",),
            ("LDS.128 R0, [R8]",),
            ("HMMA.16816.F32 R4, R4, R6, R8",),
            ("HGMMA.64x32x8.F32.TF32 R0, R4, gdesc[UR4]",),
            ("DFMA R0, R2, R4, R0",),
            ("DMMA.8x8x4 R0, R2, R4, R0",),
        ),
        mma=6,
        fp64=2,
    )
    assert used == {"issue": 6, "shared": 32, "mma": 6 + 16, "fp64": 2 + 8}


MADE_UP = (  # a strip: 4 + 1 cycles, and a walk of 280 + 4 + 1 for each tile
    ("MOV R0, R1", 4),  # 0x00
    ("LDG.E.128 R4, [R2.64]", 1, 0),  # 0x10
    ("FADD R1, R4, R1", 4, 7, 7, 1),
    ("@P0 BRA 0x10",),
    ("@P1 BRA 0x00",),
    ("EXIT",),
)
SMALL = Resources(registers=32, shared=0, spilled=0, threads=128)


def work(**changed):
    strip = Named("strip", "MOV", (Named("walk", "LDG FADD"),))
    given = {"tensor": 1e6, "once": 2e6, "again": 1e6, "resident": 1e6, "l2": 3e6}
    given |= {"items": [{"walk": 10}] * 264, "programs": 132, "loop": strip}
    return Work(**given | changed)


def test_the_slowest_of_memory_cache_and_loops():
    chip = CHIPS[90]
    found = predicted(code(*MADE_UP), SMALL, work(), chip)
    strip = 10 * (280 + 4 + 1) + 4 + 1
    assert found["cycles_a_tile"] == {"walk": 285} and found["cycles_a_strip"]["latency"] == strip
    assert found["limit"] == "latency"
    assert found["predicted_us"] == pytest.approx(2 * strip / 1755, rel=0.01)  # two a program
    far = predicted(code(*MADE_UP), SMALL, work(once=3e9), chip)
    assert far["limit"] == "memory" and far["predicted_us"] == pytest.approx(1000, rel=0.01)
    played = predicted(code(*MADE_UP), SMALL, work(once=3e9, stages=lambda _: 2e6), chip)
    assert played["limit"] == "stages" and played["predicted_us"] == pytest.approx(
        2e12 / chip.clock, rel=0.01
    )
    cached = predicted(code(*MADE_UP), SMALL, work(l2=5.5e9), chip)
    assert cached["limit"] == "L2" and cached["predicted_us"] == pytest.approx(1000, rel=0.01)


def test_what_leaves_the_cache_is_read_again_from_memory():
    found = predicted(code(*MADE_UP), SMALL, work(resident=200e6), CHIPS[90])  # of 50 MB
    assert found["memory_per_byte"] == 2 + 0.75
    assert found["cycles_a_tile"] == {"walk": round(0.25 * 280 + 0.75 * 700) + 5}


def test_warps_share_their_scheduler():
    """With enough of them it issues without a pause, and one more costs its own instructions."""
    crowd = work(programs=132 * 16, items=[{"walk": 10}] * 132 * 16)
    found = predicted(code(*MADE_UP), SMALL, crowd, CHIPS[90])
    assert found["programs_at_once"] == 16  # of 4 warps: 16 on each scheduler
    assert found["cycles_a_strip"]["issue"] == 16 * (10 * 3 + 2)


def test_unrolling_changes_no_prediction():
    twice = (*MADE_UP[:3], *MADE_UP[1:3], ("@P0 BRA 0x10",), ("@P1 BRA 0x00",), ("EXIT",))
    per = Named("strip", "MOV", (Named("walk", "LDG FADD", per="LDG"),))
    once, unrolled = (
        predicted(code(*lines), SMALL, work(loop=per), CHIPS[90])["predicted_us"]
        for lines in (MADE_UP, twice)
    )
    assert unrolled == pytest.approx(once, rel=0.01)


def test_a_loop_that_is_not_there_is_named():
    lost = work(loop=Named("strip", "MOV", (Named("walk", "HMMA"),)))
    with pytest.raises(LookupError, match="'HMMA' of 'walk' among: 0x10, 3 long"):
        predicted(code(*MADE_UP), SMALL, lost, CHIPS[90])


def test_programs_that_fit_a_multiprocessor():
    chip = CHIPS[90]
    assert slots(Resources(255, 0, 0, 128), chip) == 2
    assert slots(Resources(32, 100 << 10, 0, 128), chip) == 2
    assert slots(Resources(32, 0, 0, 1024), chip) == 2
    assert slots(Resources(16, 0, 0, 32), chip) == 32


def test_the_longest_chain():
    assert longest([5, 1, 5, 1], programs=2, places=2, in_turn=True) == 10
    assert longest([5, 1, 5, 1], programs=4, places=2, in_turn=False) == 6
    assert longest([1, 1, 1], programs=3, places=2, in_turn=True) == 2


PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 p, .param .u32 n) {
  .reg .u64 %a; .reg .u32 %i, %n; .reg .f32 %x<4>; .reg .pred %p;
  ld.param.u64 %a, [p]; ld.param.u32 %n, [n]; mov.u32 %i, 0;
AGAIN:
  ld.global.v4.f32 {%x0, %x1, %x2, %x3}, [%a];
  add.f32 %x0, %x0, %x1; add.f32 %x2, %x2, %x3;
  st.global.v2.f32 [%a], {%x0, %x2};
  add.u64 %a, %a, 4096; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, %n;
  @%p bra AGAIN;
  ret;
}
"""


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_reads_a_real_cubin(arch, tmp_path):
    """Unrolled or not by the assembler."""
    tools = ROOT / TRITON.__path__[0] / "backends" / "nvidia" / "bin"
    (tmp_path / "scale.ptx").write_text(PTX)
    name = "ptxas-blackwell" if arch >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas"
    command = [tools / name, f"-arch=sm_{arch}", tmp_path / "scale.ptx", "-o", tmp_path / "x.cubin"]
    subprocess.run(command, check=True)
    (used,) = resources(tmp_path / "x.cubin").values()
    assert 0 < used.registers < 64 and used.spilled == 0
    (found,) = disassembled(tmp_path / "x.cubin").values()
    loops = [loop for loop in nest(found).inner if loop.has("LDG")]
    assert loops
    for loop in loops:
        kinds = widths(loop.code)
        (loads,), (stores,) = kinds["loads"].items(), kinds["stores"].items()
        assert (loads[0], stores[0]) == ("16", "8") and loads[1] == stores[1]
        rounds = played(loop.code, NEAR).cycles / loads[1]
        assert 280 < rounds * loads[1] and rounds < 400


BY_HAND = {  # % of copy on H100, found by hand from the same code before this tool was
    "right [65536, 4096] bf16 k 16": 47,
    "right [65536, 4096] bf16 k 64": 24,
    "right [65536, 4096] bf16 k 256": 3.5,
    "right [65536, 4096] fp32 k 16": 35,
    "right [65536, 4096] fp32 k 64": 16,
    "right [65536, 4096] fp32 k 256": 3,
    "left [4096, 14336] bf16 k 16": 43,
    "left [4096, 14336] bf16 k 64": 19,
    "left [14336, 4096] bf16 k 16": 39,
    "left [14336, 4096] bf16 k 64": 18,
}


def test_agrees_with_what_was_found_by_hand():
    runs = read_json(ROOT / "benchmarks" / "results" / "static_before.json")["runs"]
    found = {
        r["case"]: 100 * r["predicted_share_of_copy"]
        for r in runs
        if r["arch"] == 90 and r["kernel"] == "project_triton"
    }
    for case, share in BY_HAND.items():
        assert found[case] == pytest.approx(share, rel=0.2), case


def test_no_configuration_of_triton_spills():
    """Every one that can be launched, on every architecture, by the compiler itself."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.static_kernels", "--resources"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["arch"] for r in results} == set(CHIPS)
    for r in results:
        assert r["spilled"] == 0, r
        assert r["shared"] <= CHIPS[r["arch"]].shared_block, r
        if r["kernel"] in ("gram_kernel", "eliminate_kernel", "apply_kernel", "columns_kernel"):
            continue  # in fp64
        assert r["matrix_instructions"] > 0, r
        assert r["narrow_copies"] == 0, r


CLUSTERS = [arch for arch in CHIPS if arch >= 90]  # before them the kernel is empty


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_no_cuda_kernel_spills():
    sources = sorted(p.name for p in CSRC.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(nvcc, *zip(*product(sources, CLUSTERS), strict=True)))
    assert sources
    for cubin in compiled:
        for name, used in resources(cubin).items():
            assert used.spilled == 0, (cubin.name, name)
        if cubin.name.startswith("project-"):
            found = disassembled(cubin)
            assert len(found) == 44
            for name, instructions in found.items():
                ops = {i.op.split(".")[0] for i in instructions}
                moves = "LDGSTS" if "Lb1E" in name else "UBLKCP"
                assert {"HMMA", "LDSM", "STAS", moves} <= ops, (cubin.name, name)
