"""Settings of every test: no network, one thread, Triton's interpreter where there is no GPU."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # several processes meet on the CPU alone
if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must stand before the package is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "grasp",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=60,
    # New cases belong to a developer's run, who can look at them; a change is judged on fixed ones.
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("grasp")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
