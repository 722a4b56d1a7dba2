"""Two processes train as one does on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import CONFIGS, outcome, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have left what they made of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parents[1] / "distributed_run.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_two_processes_are_one(tmp_path, folder, case):
    ranks = [torch.load(folder / f"{case}-{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(ranks[0]["student"], ranks[1]["student"], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0]["projections"], ranks[1]["projections"], rtol=0, atol=0)
    if case == "tasks":
        return  # one process draws other batches; that both agree is what there is to see
    alone = outcome(train(case, tmp_path, batch_size=4))
    torch.testing.assert_close(ranks[0]["student"], alone["student"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks[0]["projections"], alone["projections"], rtol=1e-5, atol=1e-5)
    assert ranks[0]["logs"] == pytest.approx(alone["logs"], rel=1e-4)
