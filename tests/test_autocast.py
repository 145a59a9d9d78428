"""fp32 products stay fp32, whatever PyTorch is set to, and the setting stays."""

from importlib import import_module
from threading import Barrier, Thread

import pytest
import torch

import grasp_kernels as gk
from grasp_kernels.autocast import in_bf16, set_aside
from grasp_kernels.testing import orthonormal

reference = import_module("grasp_kernels.project")  # the package has a function of that name
cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
READ = (
    torch.get_float32_matmul_precision,
    lambda: cuda.matmul.allow_tf32,
    lambda: cuda.matmul.fp32_precision,
    lambda: cudnn.fp32_precision,
    lambda: mkldnn.matmul.fp32_precision,
    lambda: mkldnn.fp32_precision,
    lambda: torch.backends.fp32_precision,
)
SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(cuda.matmul, "allow_tf32", True),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(mkldnn.matmul, "fp32_precision", "bf16"),
    "both": lambda: (SETTINGS["medium"](), setattr(cuda.matmul, "fp32_precision", "ieee")),
    "against": lambda: (SETTINGS["high"](), setattr(mkldnn.matmul, "fp32_precision", "bf16")),
}


def state() -> list:
    found = []
    for read in READ:
        try:
            found.append(read())
        except RuntimeError:  # the older interface refuses to speak once the newer one was used
            found.append("refused")
    return found


@pytest.fixture(params=SETTINGS)
def rounded(request):
    SETTINGS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for settings in (cuda.matmul, mkldnn.matmul, torch.backends):
        settings.fp32_precision = "none"


def test_products_are_made_in_fp32(rounded, monkeypatch):
    seen = []
    real = reference.project_strips

    def spy(*arguments):
        seen.append((cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision))
        return real(*arguments)

    for module in (reference, import_module("grasp_kernels.projector")):
        monkeypatch.setattr(module, "project_strips", spy)
    before, T, V = state(), torch.randn(64, 96), orthonormal(96, 8)
    h = torch.randn(4, 96, requires_grad=True)
    found = [gk.project(T, V), T.clone(), T.clone()]
    gk.project_(found[1], V, check=True)
    gk.Projector([found[2]], [V])()
    gk.project_gradient(h, V).square().sum().backward()
    assert state() == before
    assert len(seen) == 4 and set(seen) == {("ieee", "ieee")}
    torch.set_float32_matmul_precision("highest")
    exact = gk.project(T, V)
    assert all(torch.equal(X, exact) for X in found)


def test_the_setting_comes_back_after_an_error(rounded):
    before = state()
    with pytest.raises(ZeroDivisionError), set_aside(), set_aside():
        assert state()[2] == state()[4] == "ieee"
        raise ZeroDivisionError
    assert state() == before


def test_what_was_inherited_goes_on_following():
    torch.backends.fp32_precision = "tf32"
    try:
        with set_aside():
            assert mkldnn.matmul.fp32_precision == "ieee"
        assert cuda.matmul.fp32_precision == mkldnn.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert cuda.matmul.fp32_precision == mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_the_last_thread_puts_it_back(rounded):
    """It is the process's: one thread that leaves must not round another's products."""
    before, inside, first_left = state(), Barrier(2), Barrier(2)
    seen = []

    def first():
        with set_aside():
            inside.wait(10)
        first_left.wait(10)

    def second():
        with set_aside():
            inside.wait(10)
            first_left.wait(10)
            seen.append((cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision))

    threads = [Thread(target=body) for body in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [("ieee", "ieee")] and state() == before


def test_what_bf16_can_hold_is_multiplied_exactly_by_its_units(rounded):
    before, generator = state(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 300, generator=generator).bfloat16() for _ in range(2))
    exact = x.double() @ y.double().mT
    with set_aside(), in_bf16():
        assert mkldnn.matmul.fp32_precision == "bf16"
        found = x.float() @ y.float().mT
    assert state() == before
    # Sums of 300 are rounded as in fp32; a product rounded to bf16 would be off by thousandths.
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_no_other_threads_products_are_made_in_bf16(rounded):
    before, done, running = state(), Barrier(2), Barrier(2)

    def other():
        running.wait(10)
        done.wait(10)

    thread = Thread(target=other)
    thread.start()
    running.wait(10)
    with set_aside(), in_bf16():
        assert mkldnn.matmul.fp32_precision == "ieee"
    done.wait(10)
    thread.join()
    assert state() == before
