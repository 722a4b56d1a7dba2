"""Models that are borrowed for a training: what was changed about them is restored when the last borrower is done."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn


@dataclass
class _Loan:
    """The state of a model when it was first borrowed, and the number of borrowers."""

    trainable: list[nn.Parameter]
    training: list[nn.Module]
    whole: bool
    device: torch.device | None
    borrowers: int = 1


_LOANS: WeakKeyDictionary[nn.Module, _Loan] = WeakKeyDictionary()


def borrow(model: nn.Module) -> None:
    """Record which parameters have gradients, which modules train, and the device, unless it is borrowed already.

    Args:
        model: to be changed afterwards, until :func:`give_back` is called as often as this.
    """
    if (loan := _LOANS.get(model)) is not None:
        loan.borrowers += 1
        return
    devices = {parameter.device for parameter in model.parameters()}
    _LOANS[model] = _Loan(
        trainable=[parameter for parameter in model.parameters() if parameter.requires_grad],
        # not itself, which its own loan would keep alive
        training=[module for module in model.modules() if module.training and module is not model],
        whole=model.training,
        device=devices.pop() if len(devices) == 1 and movable(model) else None,
    )


def give_back(model: nn.Module) -> None:
    """Restore what :func:`borrow` recorded, once nobody borrows the model any more.

    Args:
        model: a borrowed model; any other is left as it is.
    """
    loan = _LOANS.get(model)
    if loan is None:
        return
    loan.borrowers -= 1
    if loan.borrowers:
        return
    del _LOANS[model]
    # its own parameters, as moving a model keeps them
    for parameter in loan.trainable:
        parameter.requires_grad_(True)
    for module in loan.training + [model] * loan.whole:
        module.training = True
    if loan.device is not None:
        model.to(loan.device)


def movable(model: nn.Module) -> bool:
    """Whether a model can be moved as a whole: not one in 8 or 4 bits, or spread over several devices.

    Args:
        model: any model.
    """
    spread = len(set(getattr(model, "hf_device_map", None) or ())) > 1
    return not (getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False) or spread)
