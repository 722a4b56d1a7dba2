"""Matmuls that a model's forward pass computes together: the numbers are those of each module by itself."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from families import BY_NAME, FAMILIES, make, outputs
from packing import INPUTS, packed, quantized
from processors import needs_exact_bytes
from torch import nn
from transformers.activations import ACT2FN

from lmcompress.checkpoint.encoding import unpack
from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.families import anatomy_of
from lmcompress.families.fusing import fuse, unfuse
from lmcompress.kernels.dispatch import ladder, using
from lmcompress.kernels.matmul import Matmul
from lmcompress.kernels.stack import Stack
from lmcompress.nn import fusion
from lmcompress.nn.fusion import Joined, follow_passes
from lmcompress.nn.packed import Layout, PackedConv1D, PackedLinear
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.packing import container_for

NAMES = ("first", "second", "third")


class Parent(nn.Module):
    """Three packed modules of 10 inputs and 6, 4 and 6 outputs, called as attention calls its projections."""

    def __init__(self, quantizer="minmax", bits=8, granularity=None, given="dynamic", kind=PackedLinear, bias=True):
        super().__init__()
        generator, said = torch.Generator().manual_seed(3), INPUTS[given]
        span = static_range(-3.0, 4.0, said) if said is not None and said.range == "static" else None
        for name, out in zip(NAMES, (6, 4, 6), strict=True):
            made = quantized(torch.randn(out, 10, generator=generator), quantizer, bits, granularity or PerRow())
            layout = Layout(made.grid, container_for(made.grid), made.granularity, made.zero_points is not None)
            shift = nn.Parameter(torch.randn(out, generator=generator)) if bias else None
            layer = kind(10, out, layout, said, shift)
            layer.fill(made, span)
            layer.joined = None
            self.add_module(name, layer)
        joined = Joined(self, NAMES)
        for name in NAMES:
            getattr(self, name).joined = joined
        self.change = None
        follow_passes(self)
        self.eval()

    def forward(self, x):
        first, x = self.first(x), x if self.change is None else self.change(x)
        return torch.cat([first, self.second(x), self.third(x)], -1)

    @property
    def joint(self):
        return self.first.joined

    def apart(self, x):
        """What the modules give outside of a forward pass."""
        return torch.cat([getattr(self, name)(x) for name in NAMES], -1)


def tokens():
    return torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def matmuls(monkeypatch):
    """The number of rows and the activation function of each matmul."""
    seen, call, codes_for, of_codes = [], Matmul.__call__, Matmul.codes_for, Matmul.of_codes

    def called(self, x, matrix, *args, **kwargs):
        seen.append((matrix.shape[0], kwargs.get("post")))
        return call(self, x, matrix, *args, **kwargs)

    def writes(self, x, matrix, bias, inputs, post, reader):
        codes = codes_for(self, x, matrix, bias, inputs, post, reader)
        seen.extend([] if codes is None else [(matrix.shape[0], post)])
        return codes

    def reads(self, codes, scales, zero_points, matrix, *args):
        seen.append((matrix.shape[0], None))
        return of_codes(self, codes, scales, zero_points, matrix, *args)

    monkeypatch.setattr(Matmul, "__call__", called)
    monkeypatch.setattr(Matmul, "codes_for", writes)
    monkeypatch.setattr(Matmul, "of_codes", reads)
    return seen


@needs_exact_bytes
@pytest.mark.parametrize("given", [name for name in INPUTS if name != "none"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()], ids=str)
@pytest.mark.parametrize(
    ("quantizer", "bits"), [("minmax", 8), ("minmax", 3), ("twn", "ternary"), ("asymmetric_minmax", 4)], ids=str
)
@torch.no_grad()
def test_one_matmul_gives_exactly_what_three_give(quantizer, bits, granularity, given, matmuls):
    for kind, bias in ((PackedLinear, True), (PackedConv1D, False)):
        parent, x = Parent(quantizer, bits, granularity, given, kind, bias), tokens()
        for numbers in (x, x[0, 0], x[:, :0], x.bfloat16()):
            matmuls.clear()
            together = parent(numbers)
            assert matmuls == [(16, None)] and fusion._NOW.joint is None
            assert torch.equal(together, parent.apart(numbers)) and together.dtype == numbers.dtype


@pytest.mark.parametrize("kind", ["weights only", "groups", "low memory", "ranges", "bias", "codes"])
@torch.no_grad()
def test_what_does_not_fit_together_is_computed_apart(kind, matmuls):
    given = {"weights only": "none", "ranges": "static"}.get(kind, "dynamic")
    parent, x = Parent(granularity=PerGroup(5) if kind == "groups" else None, given=given), tokens()
    if kind == "ranges":
        parent.second.input_scale.mul_(2.0)
    elif kind == "bias":
        parent.second.bias = None
    elif kind == "codes":
        parent.second = Parent(bits=4).second
        parent.second.joined = parent.joint
    with using(memory="low" if kind == "low memory" else "fast"):
        assert torch.equal(parent(x), parent.apart(x))
    assert matmuls == [(6, None), (4, None), (6, None)] * 2


@torch.no_grad()
def test_equal_ranges_are_joined_until_one_changes(matmuls):
    parent, x = Parent(given="static"), tokens()
    parent(x)
    assert matmuls.pop() == (16, None)
    parent.third.input_scale.mul_(0.5)
    assert torch.equal(parent(x), parent.apart(x)) and len(matmuls) == 6


@needs_exact_bytes
@torch.no_grad()
def test_another_tensor_is_another_input():
    parent, x = Parent(), tokens()
    parent.change = torch.clone
    assert torch.equal(parent(x), parent.apart(x))
    parent.change = lambda x: x * 2
    wanted = torch.cat([parent.first(x), parent.second(x * 2), parent.third(x * 2)], -1)
    assert torch.equal(parent(x), wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["before", "after", "forward", "everywhere"])
def test_whoever_looks_on_sees_each_module_by_itself(how, mode, matmuls):
    parent, x, seen = Parent(), tokens(), []
    handle = None
    if how == "before":
        handle = parent.second.register_forward_pre_hook(lambda module, args: args[0].mul_(2))
    elif how == "after":
        handle = parent.second.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    elif how == "forward":
        parent.second.forward = lambda x: PackedLinear.forward(parent.second, x)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given))
    with mode():
        y = parent(x.clone())
        if handle is not None:
            handle.remove()
        assert [rows for rows, _ in matmuls] == [6, 4, 6] and len(seen) == {"after": 1, "everywhere": 4}.get(how, 0)
        twice = x * 2 if how == "before" else x
        assert torch.equal(y, torch.cat([parent.first(x), parent.second(twice), parent.third(twice)], -1))


@torch.no_grad()
def test_outside_of_a_forward_pass_a_module_computes_its_own(matmuls):
    parent, x = Parent(), tokens()
    parent.second(x)
    assert matmuls == [(4, None)]


@torch.no_grad()
def test_a_pass_that_was_interrupted_is_over(matmuls):
    def interrupt(x):
        raise KeyboardInterrupt

    parent, x = Parent(), tokens()
    parent.change = interrupt
    # torch calls no hooks at the end of such a pass
    with pytest.raises(KeyboardInterrupt):
        parent(x)
    matmuls.clear()
    parent.second(x)
    assert matmuls == [(4, None)] and fusion._NOW.passes == 0 and fusion._NOW.joint is None
    with pytest.raises(KeyboardInterrupt):
        parent(x)
    parent.change = None
    matmuls.clear()
    parent(x)
    assert matmuls == [(16, None)] and fusion._NOW.passes == 0 and fusion._NOW.frame is None


@torch.no_grad()
def test_a_pass_that_another_hook_refused_never_began(matmuls):
    def refuse(module, args):
        raise ZeroDivisionError

    parent, x = Parent(), tokens()
    with parent.register_forward_pre_hook(refuse, prepend=True), pytest.raises(ZeroDivisionError):
        parent(x)
    parent(x)
    assert matmuls == [(16, None)] and fusion._NOW.passes == 0


def test_where_a_gradient_is_asked_for_nothing_is_joined(matmuls):
    parent, x = Parent(), tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(parent(x).sum(), x)
    assert [rows for rows, _ in matmuls] == [6, 4, 6]
    (apart,) = torch.autograd.grad(parent.apart(x).sum(), x)
    assert torch.equal(gradient, apart)


@needs_exact_bytes
@torch.no_grad()
def test_tensors_that_change_are_seen():
    parent, other, x = Parent(), Parent("mse"), tokens()
    parent(x)
    parent.load_state_dict(other.state_dict())
    assert torch.equal(parent(x), other(x))
    parent.second.bias.add_(1.0)
    assert torch.equal(parent(x), parent.apart(x))
    parent.third.weight_scales.mul_(2.0)
    assert torch.equal(parent(x), parent.apart(x))
    assert torch.equal(parent.bfloat16()(x.bfloat16()), parent.apart(x.bfloat16()))


@needs_exact_bytes
@torch.no_grad()
def test_copies_are_joined_among_themselves(matmuls):
    parent, x = Parent(), tokens()
    wanted = parent(x)
    for other in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert other.joint.parent is other and other.third.joined is other.joint is not parent.joint
        matmuls.clear()
        assert torch.equal(other(x), wanted) and matmuls == [(16, None)]
        other.second.weight_scales.mul_(2.0)
        assert torch.equal(other(x), other.apart(x)) and torch.equal(parent(x), wanted)
    alone = copy.deepcopy(parent.second)
    assert alone.joined.parent is None and torch.equal(alone(x), parent.second(x))
    # a module in two places belongs to the one that it was joined in
    parent.second = alone
    matmuls.clear()
    assert torch.equal(parent(x), wanted) and len(matmuls) == 3


@torch.no_grad()
def test_nothing_is_kept_and_matrices_are_prepacked_once():
    parent, x = Parent(), tokens()
    parent.apart(x)
    y = parent(x)
    results = [weakref.ref(y), weakref.ref(x)]
    assert parent.joint.kernel and not any(getattr(parent, name)._matmul._ready for name in NAMES)
    assert parent.joint._matmul._ready
    del x, y
    gc.collect()
    assert [result() for result in results] == [None, None]

    def fails(x):
        raise ZeroDivisionError

    parent.change = fails
    with pytest.raises(ZeroDivisionError):
        parent(tokens())
    assert fusion._NOW.joint is None and fusion._NOW.passes == 0
    # parents die with their last name
    dead = weakref.ref(parent)
    del parent
    assert dead() is None


@needs_exact_bytes
def test_threads_have_their_own_results():
    parent, wrong = Parent(), []
    with torch.no_grad():
        cases = [(x, parent.apart(x)) for x in torch.randn(4, 2, 3, 10)]

    def run(x, wanted):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(parent(x), wanted):
                    wrong.append(x)

    threads = [threading.Thread(target=run, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stack_is_the_matrix_of_all_rows():
    for granularity in (PerTensor(), PerRow(), PerGroup(5)):
        parts = tuple(getattr(Parent("asymmetric_minmax", 4, granularity), name).matrix() for name in NAMES)
        stack = Stack(parts)
        assert stack.shape == (16, 10) and Stack.fits(parts)
        assert torch.equal(stack.whole()[0].values(), torch.cat([part.values() for part in parts]))
    assert not Stack.fits([parts[0], Parent().first.matrix()])


def of_family(family, given="dynamic", **config):
    model = make(family, **config)
    return packed(model, granularity=PerRow(), inputs=given).eval()


def unfused(model):
    other = copy.deepcopy(model)
    unfuse(other)
    return other


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["dynamic", "token", "static"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_every_family_computes_less_often_and_the_same(family, given, matmuls):
    model = of_family(family, given)
    plain = unfused(model)
    names, state = [name for name, _ in model.named_modules()], model.state_dict()
    assert names == [name for name, _ in plain.named_modules()] and list(state) == list(plain.state_dict())
    matmuls.clear()
    wanted = outputs(plain)
    apart = [rows for rows, _ in matmuls]
    matmuls.clear()
    assert_same(outputs(model), wanted)
    blocks = anatomy_of(model).blocks
    separate = sum(block.has("query") for block in blocks)
    assert len(matmuls) == len(apart) - 2 * separate and sum(rows for rows, _ in matmuls) == sum(apart)
    posts = [post for _, post in matmuls if post is not None]
    # Llama's activation function follows the gate, whose output is multiplied first
    each = {"gpt2": ["gelu_tanh"], "llama": []}.get(family.name, ["gelu"])
    assert posts == each * len(blocks)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        matmuls.clear()
        assert_same(outputs(again), wanted)
        assert [post for _, post in matmuls if post] == posts
    unpack(model)
    assert not any("Fused" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "gelu_python", "silu", "gelu_fast"])
@torch.no_grad()
def test_activation_functions_stay_what_they_are(name, matmuls):
    model = of_family(FAMILIES[0], hidden_act=name)
    layer = model.bert.encoder.layer[0]
    wanted = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(name)
    assert_same(outputs(model), outputs(unfused(model)))
    assert [post for _, post in matmuls].count(wanted) >= 3
    assert isinstance(layer.intermediate.intermediate_act_fn, type(ACT2FN[name]))
    x = torch.randn(2, 3, 16)
    # by itself, the module before it gives what enters the function
    function = unfused(model).bert.encoder.layer[0].intermediate.intermediate_act_fn
    assert torch.equal(layer.intermediate(x), function(layer.intermediate.dense(x)))


@pytest.fixture
def coded(monkeypatch):
    """The dtypes of the inputs that were read as codes."""
    seen, stock = [], PackedLinear._of_codes

    def reads(self, codes, dtype):
        seen.append(dtype)
        return stock(self, codes, dtype)

    for kind in (PackedLinear, PackedConv1D):
        monkeypatch.setattr(kind, "_of_codes", reads)
    return seen


@pytest.mark.skipif(ladder("cpu")["onednn"] != "works", reason="only oneDNN writes codes")
@pytest.mark.parametrize("given", ["static", "static asymmetric", "static 8"])
@pytest.mark.parametrize("family", [BY_NAME["bert"], BY_NAME["distilbert"], BY_NAME["gpt2"]], ids=str)
@torch.no_grad()
def test_static_ranges_pass_codes_from_matmul_to_matmul(family, given, coded, monkeypatch):
    monkeypatch.setitem(INPUTS, "static 8", ActivationEncoding(bits=8, symmetric=False, range="static"))
    model = of_family(family, given)
    plain = unfused(model)
    wanted = outputs(plain)
    assert_same(outputs(model), wanted)
    assert coded == [torch.float32] * 3
    # bfloat16 differs from float32 as it does without codes
    errors = [float((outputs(one.bfloat16()).float() - wanted).norm() / wanted.norm()) for one in (model, plain)]
    assert coded == [torch.float32] * 3 + [torch.bfloat16] * 3 and errors[0] < 3 * errors[1] + 0.02, errors
    # few tokens take another kernel, which writes floats
    coded.clear()
    outputs(model, rows=1, length=2)
    assert not coded
    with using(memory="low"):
        outputs(model)
    with using(kernel="reference"):
        outputs(model)
    assert not coded


@pytest.mark.parametrize("part", ["output", "output.dense", "intermediate"])
@torch.no_grad()
def test_whoever_reads_an_activation_gets_numbers(part, coded):
    model, seen = of_family(FAMILIES[0], "static"), []
    layer = model.bert.encoder.layer[1]
    module = layer.get_submodule(part)
    if part == "intermediate":
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    else:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert_same(outputs(model), outputs(unfused(model)))
    assert seen == [torch.float32] * 2 and len(coded) <= 2


@pytest.mark.parametrize("how", ["replaced", "hooked", "hooked dense", "replaced dense"])
@torch.no_grad()
def test_a_function_that_is_looked_at_or_replaced_gets_its_input(how, matmuls):
    model, seen = of_family(FAMILIES[0]), []
    for layer in model.bert.encoder.layer:
        part = layer.intermediate
        if how == "replaced":
            part.intermediate_act_fn = nn.ReLU()
        elif how == "replaced dense":
            part.dense = copy.deepcopy(part.dense)
        else:
            module = part.dense if how == "hooked dense" else part.intermediate_act_fn
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same(outputs(model), outputs(unfused(model)))
    assert not any(post for _, post in matmuls)


class Recorder:
    """A backend that runs graphs as they are and counts the matmuls in them."""

    def __init__(self):
        self.counts = []

    def __call__(self, graph, examples):
        names = [str(node.target) for node in graph.graph.nodes]
        self.counts.append(sum(name.startswith("lmcompress.matmul") for name in names))
        return graph


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bert", "static"),
        ("gpt2", "dynamic"),
        *(
            pytest.param(name, given, marks=pytest.mark.slow)
            for name in ("bert", "gpt2", "distilbert")
            for given in ("dynamic", "static", "token")
        ),
    ],
)
@torch.no_grad()
def test_a_compiled_model_is_one_graph_with_the_same_matmuls(name, given):
    # a copy was never called, nor was the model itself
    torch.compiler.reset()
    model, recorder = copy.deepcopy(of_family(BY_NAME[name], given)), Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for size in ({}, {"rows": 5, "length": 7}, {"rows": 2, "length": 11}):
        assert_same(outputs(compiled, **size), outputs(model, **size))
    counts = [count for count in recorder.counts if count]
    # once for the first size and once for any
    assert counts == [12, 12] and fusion._NOW.passes == 0 and fusion._NOW.joint is None


@torch.no_grad()
def test_two_threads_may_call_one_model():
    model, wrong = of_family(FAMILIES[0]), []
    cases = [({"rows": rows, "seed": rows}, outputs(model, rows=rows, seed=rows)) for rows in (1, 2, 3)]

    def run(batch, wanted):
        for _ in range(15):
            if not torch.equal(outputs(model, **batch), wanted):
                wrong.append(batch)

    threads = [threading.Thread(target=run, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_fusing_twice_is_fusing_once(matmuls):
    model = of_family(FAMILIES[0])
    wanted = outputs(model)
    count = len(matmuls)
    fuse(model, anatomy_of(model).blocks)
    assert len(model.base_model._forward_hooks) == 2
    matmuls.clear()
    assert all(map(torch.equal, outputs(model), wanted)) and len(matmuls) == count
    unfuse(model)
    unfuse(model)
    assert all(module.joined is None for module in model.modules() if isinstance(module, PackedLinear))
