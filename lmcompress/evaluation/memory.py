"""Peak memory of any call, and of loading a checkpoint and running it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from lmcompress.errors import LmcompressError, nearest

# importing this module imports lmcompress, which registers its loader
_PROBE = "import sys; from lmcompress.evaluation.memory import _probe; _probe(*sys.argv[1:])"


@dataclass(frozen=True)
class Memory:
    """Memory of a call.

    Attributes:
        baseline_bytes: memory held before it.
        peak_bytes: maximum memory held during it.
    """

    baseline_bytes: int
    peak_bytes: int

    @property
    def used_bytes(self) -> int:
        """Peak above the baseline."""
        return max(self.peak_bytes - self.baseline_bytes, 0)


def peak_memory(function: Callable[..., Any], *args: Any, device: str | None = None) -> Memory:
    """Peak memory of one call: torch's on a CUDA device, or the resident memory of a fresh process on the CPU.

    On CUDA the call runs here. Otherwise it runs in a spawned process, which imports the module of ``function``;
    a script must guard its main part with ``if __name__ == "__main__"``.

    Args:
        function: must be picklable for the fresh process: defined in a module, not a lambda.
        *args: its arguments, picklable.
        device: ``cpu`` or a CUDA device; default: CUDA if available.

    Returns:
        the peak and the memory held before the call.

    Raises:
        LmcompressError: If the device is another kind.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        baseline = torch.cuda.memory_allocated(place)
        function(*args)
        torch.cuda.synchronize(place)
        return Memory(baseline_bytes=baseline, peak_bytes=torch.cuda.max_memory_allocated(place))
    if place.type != "cpu":
        raise LmcompressError(f"memory is measured on cpu and cuda, got {device!r}")
    # spawned, not forked: a fork starts with this process's memory
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory_of, function, *args).result()


def measure_peak_memory(
    folder: str | Path, auto_class: str = "AutoModel", batch: int = 1, length: int = 128, *, threads: int | None = None
) -> Memory:
    """Resident memory of loading a checkpoint and one forward pass on the CPU, in a fresh process.

    The baseline is that of the process after ``import lmcompress``, so that ``used_bytes`` is the model's share: its
    weights, their unpacking, activations.

    Args:
        folder: a checkpoint.
        auto_class: name of the Transformers class that loads it, such as ``"AutoModelForSequenceClassification"``.
        batch: rows of the forward pass.
        length: tokens of a row.
        threads: torch's threads in that process; default this process's.

    Returns:
        baseline and peak, and their difference as ``used_bytes``.

    Raises:
        LmcompressError: If the class is unknown, the folder does not exist, or the process failed.
    """
    known = [name for name in dir(transformers) if name.startswith("AutoModel")]
    if auto_class not in known:
        raise LmcompressError(f"unknown auto class {auto_class!r}{nearest(auto_class, known)}")
    if not Path(folder).is_dir():
        raise LmcompressError(f"a checkpoint's folder must exist, {str(folder)!r} does not")
    probe = [sys.executable, "-c", _PROBE, str(folder), auto_class, str(batch), str(length)]
    # the package may run from a checkout that is not installed
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads or torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(probe, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise LmcompressError(f"measuring the memory of {str(folder)!r} failed:\n{done.stderr.strip()[-2000:]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def _memory_of(function: Callable[..., Any], *args: Any) -> Memory:
    _forget_peak()
    baseline = _status_bytes("VmRSS") or _max_resident()
    result = function(*args)
    peak = _status_bytes("VmHWM") or _max_resident()
    del result
    return Memory(baseline_bytes=baseline, peak_bytes=peak)


def _probe(folder: str, auto_class: str, batch: str, length: str) -> None:
    # resolved here: transformers imports lazily, and that memory is not the model's
    loader = getattr(transformers, auto_class)
    print(json.dumps(asdict(_memory_of(_load_and_run, loader, folder, int(batch), int(length)))))


def _load_and_run(loader: Any, folder: str, batch: int, length: int) -> Any:
    model = loader.from_pretrained(folder).eval()
    ids = torch.arange(batch * length).reshape(batch, length) % model.config.vocab_size
    with torch.inference_mode():
        return model, model(input_ids=ids, attention_mask=torch.ones_like(ids))


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak is then that of the whole process


def _status_bytes(key: str) -> int | None:
    # not ru_maxrss: Linux keeps it across exec, so that the child of a large process starts with the parent's peak
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _max_resident() -> int:
    # in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
