"""The order of a run, which is that of importance, and the seconds that each part may take."""

from typing import NamedTuple


class Part(NamedTuple):
    name: str
    seconds: float
    of: str
    least: float = 0.0
    """Seconds that it is worth beginning with; half of `seconds` where it says nothing."""
    code: str = ""
    """Module and function in this folder; `NAME.measure` where it says nothing."""

    @property
    def begins_with(self) -> float:
        return self.least or self.seconds / 2

    @property
    def function(self) -> tuple[str, str]:
        module, _, function = (self.code or f"{self.name}.measure").partition(".")
        return module, function


ABOUT = Part("about", 60, "which device, which versions")
PARTS = (
    Part("build", 120, "the CUDA library, where nvcc is, and whether it loads"),
    Part("copies", 20, "copies and _foreach_mul_: what the memory gives"),
    Part("matrices", 120, "one matrix by every backend, addmm_ and torch.compile"),
    Part("lists", 90, "every LoRA factor of a large model"),
    Part("counters", 60, "bytes that three kernels move, by ncu"),
    Part("variants", 60, "stages, warps and blocks of the Triton kernel"),
    Part("leak", 30, "what gets through, against PyTorch"),
    Part("step", 60, "a guarded training step against a plain one"),
    Part("orthonormalize", 25, "orthonormalisation against torch.linalg.qr"),
    Part("memcheck", 80, "compute-sanitizer on every kernel"),
    Part("tests", 600, "the kernels' tests, with all the time that is left", least=30),
)
PICTURE = Part("picture", 30, "roofline.png", least=5)
HIDDEN = (
    Part("crashes", 30, "aborts after two lines", code="failing.crashes"),
    Part("hangs", 3, "never ends, and has a child", code="failing.hangs"),
    Part("waits", 60, "the same, with more time", code="failing.hangs"),
    Part("raises", 30, "an exception after one line", code="failing.raises"),
    Part("lacks", 30, "needs a package that nobody has", code="failing.lacks"),
    Part("odd", 30, "figures that JSON has no word for", code="failing.odd"),
)
NAMED = {part.name: part for part in (ABOUT, *PARTS, PICTURE, *HIDDEN)}
