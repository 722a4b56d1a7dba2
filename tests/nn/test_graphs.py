"""Packed models in graphs that torch itself records: traced, saved and loaded, and exported."""

import io
import itertools

import pytest
import torch
from packed_graphs import EXAMPLE, HEADS, KIND_IDS, KINDS, OTHERS, check, packed_for_export

from lmcompress.numerics.activations import dynamic, learned
from lmcompress.numerics.graphs import recording
from lmcompress.numerics.quantizers.learned import pact

AUTO = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


def traced(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, EXAMPLE, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def exported(model):
    return torch.export.export(model, EXAMPLE, dynamic_shapes=(AUTO, AUTO)).module()


QUICK = {(traced, "minmax 8, by token"), (traced, "twn ternary, weights only"), (exported, "minmax 8, dynamic")}


def cases():
    for how, name, (kind, called) in itertools.product((traced, exported), HEADS, zip(KINDS, KIND_IDS, strict=True)):
        marks = () if (how, called) in QUICK else pytest.mark.slow
        yield pytest.param(how, name, *kind, id=f"{how.__name__}-{name}-{called}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "name", "weights", "scheme", "attention"), list(cases()))
def test_a_graph_gives_what_the_packed_model_gives(how, name, weights, scheme, attention):
    model = packed_for_export(name, weights, scheme, attention)
    check(how(model), model, OTHERS[:2])


class _Quantizes(torch.nn.Module):
    """Every function that has a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.step, self.offset, self.clip = (torch.nn.Parameter(torch.tensor([[value]])) for value in (0.1, -0.7, 1.5))

    def forward(self, x):
        symmetric, shifted = learned(x, self.step), learned(x, self.step, self.offset)
        cut = dynamic(x, clip=1.0, check=False)
        weight = pact(x, self.clip, bits=4)
        of_all = (symmetric, shifted, cut, weight)
        return torch.stack([one.values for one in of_all] + [one.levels for one in of_all]), weight.scales


@pytest.mark.filterwarnings("ignore")
def test_functions_with_gradients_of_their_own_are_plain_arithmetic_in_a_graph():
    module, file = _Quantizes(), io.BytesIO()
    x, other = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    # with gradients on: what is recorded has none all the same
    torch.jit.save(torch.jit.trace(module, x, check_trace=False), file)
    file.seek(0)
    graph = torch.jit.load(file)
    for given in (x, other):
        for got, wanted in zip(graph(given), module(given), strict=True):
            torch.testing.assert_close(got, wanted)
    assert module(x)[0].requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_graphs_that_leave_the_process_are_recorded():
    seen = []

    class Asks(torch.nn.Module):
        def forward(self, x):
            seen.append(recording())
            return x + 1

    Asks()(torch.ones(1))
    torch.jit.trace(Asks(), torch.ones(1), check_trace=False)
    torch.export.export(Asks(), (torch.ones(1),), strict=False)
    assert seen[0] is False and all(seen[1:]) and len(seen) >= 3 and not recording()
