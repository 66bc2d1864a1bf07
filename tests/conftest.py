"""What all tests share: reproducible numbers, one thread, and reference data that not every machine has."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.pop("HF_HUB_OFFLINE", None)
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody is there: tests meet no Hub but those that they start
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported; LoopbackHub has no Xet

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported: kernels then run on the CPU
hypothesis.settings.register_profile(
    "dyhead_zoo",
    deadline=None,  # a busy machine is no failure
    derandomize="DYHEAD_ZOO_FUZZ" not in os.environ,  # the verdict follows from the code; set it to look for new cases
)
hypothesis.settings.load_profile("dyhead_zoo")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _reference(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"reference data: set {variable} to its folder")
    folder = Path(os.environ[variable])
    if not folder.is_dir():
        pytest.fail(f"{variable}={folder} is no folder")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Photos, annotations and published COCOeval figures; ``DYHEAD_ZOO_DATA`` names the folder."""
    return _reference("DYHEAD_ZOO_DATA")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Reference outputs of other implementations; ``DYHEAD_ZOO_PARITY`` names the folder."""
    return _reference("DYHEAD_ZOO_PARITY")
