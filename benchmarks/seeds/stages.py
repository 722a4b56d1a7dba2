"""What the benchmarks of sparsity share: dense networks that are trained once, and networks that are kept on disk."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mnist
from common import once, train_and_report
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import set_seed

FILE = "network.safetensors"
EPOCHS, LEARNING_RATE = 20, 1e-3
QUICK_STEPS = 20


def dense(
    options: argparse.Namespace, data: mnist.Data, name: str, make: Callable[[], mnist.Network], seed: int,
    *, kind: str = "dense", epochs: float = EPOCHS,
) -> Path:  # fmt: skip
    """A dense network that all these benchmarks start from.

    Args:
        options: of the command line.
        data: rows.
        name: of the network.
        make: a fresh one.
        seed: of its start and of the order of the rows.
        kind: where it lies, apart from those of other rows or epochs.
        epochs: passes over the training rows.

    Returns:
        The folder that holds it, its errors in ``row.json``.
    """
    folder: Path = options.work / "seeds" / kind / name / str(seed)

    def run() -> dict[str, Any]:
        set_seed(seed)
        return trained(options, data, make(), folder, epochs=epochs, seed=seed)

    once(folder, {"network": name, "seed": seed, "stage": "dense"}, run)
    return folder


def trained(
    options: argparse.Namespace, data: mnist.Data, network: nn.Module, folder: Path, *, epochs: float, seed: int,
    learning_rate: float = LEARNING_RATE, **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a network, keep it, and count its errors.

    Args:
        options: of the command line.
        data: rows.
        network: changed in place.
        folder: for the network.
        epochs: passes over the training rows.
        seed: of their order.
        learning_rate: at its greatest.
        **given: to :func:`mnist.train`.

    Returns:
        Errors, steps and seconds.
    """
    started = time.time()
    given |= {"max_steps": QUICK_STEPS} if options.quick else {}
    trainer = mnist.train(
        network, data.train, folder / "trainer", epochs=epochs, learning_rate=learning_rate, seed=seed, **given
    )
    keep(network, folder)
    return {
        "errors": mnist.errors(network, data.test), "steps": trainer.state.global_step, "epochs": epochs,
        "seconds": round(time.time() - started),
    }  # fmt: skip


def keep(network: nn.Module, folder: Path) -> None:
    """Write a network's weights.

    Args:
        network: any.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, folder / FILE
    )


def loaded(make: Callable[[], mnist.Network], folder: Path) -> mnist.Network:
    """A network as :func:`keep` wrote it.

    Args:
        make: a fresh one.
        folder: where it is.

    Returns:
        The network.
    """
    network = make()
    network.load_state_dict(load_file(folder / FILE))
    return network


def parameters(network: nn.Module) -> tuple[int, int]:
    """How many parameters a network has, and how many of them are not 0.

    Args:
        network: any.

    Returns:
        Both, biases included.
    """
    counted = [(p.numel(), int((p != 0).sum())) for p in network.parameters()]
    return sum(n for n, _ in counted), sum(left for _, left in counted)


def main(
    name: str, description: str | None, run: Callable[[argparse.Namespace, Path], None],
    report: Callable[[argparse.Namespace, Path], None], networks: Iterable[str] = (),
) -> None:  # fmt: skip
    """The command line of a benchmark: train what is missing and write the results, as the options say.

    Args:
        name: of the benchmark.
        description: its docstring.
        run: called with the options and the folder of its runs.
        report: likewise.
        networks: that ``--networks`` chooses from.
    """
    parser = mnist.parser(description)
    if networks:
        parser.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks))
    train_and_report(f"seeds/{name}", parser, run, report)
