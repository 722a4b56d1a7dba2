"""Fixtures for all tests: offline, deterministic, quiet, tiny models."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

import pytest
import torch
import transformers
from families import TYPICAL, TestFamily, make

import lmcompress  # noqa: F401  (registers the loader)

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """Keeps libraries and collected tests out of the garbage collector's way.

    Every training ends with ``gc.collect()``, which took 2 of the 2.5 seconds of a tiny one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=TYPICAL, ids=str)
def family(request) -> TestFamily:
    """BERT and GPT-2; a module whose claims are about positions or projected embeddings has all of FAMILIES."""
    return request.param


@pytest.fixture
def make_model():
    """``make_model(family, head="classification", seed=0, **config)``: a tiny random model."""
    return make


_WITHOUT_LMCOMPRESS = """
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lmcompress":
            raise ModuleNotFoundError("lmcompress is not installed here")

sys.meta_path.insert(0, Blocked())
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
"""


@pytest.fixture
def without_lmcompress(tmp_path):
    """``without_lmcompress(code, *arguments)``: runs ``code`` in a process that cannot import lmcompress."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
        # of an installed lmcompress, whose import is blocked here
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", _WITHOUT_LMCOMPRESS + code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(tmp_path), timeout=200)

    return run
