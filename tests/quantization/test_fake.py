import copy
import itertools
import pickle

import pytest
import torch
from families import cut_to_nothing, cut_unevenly, inputs, make, outputs
from torch.utils.data import Dataset
from transformers import TrainingArguments

from lmcompress import CompressedModel
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, is_conv1d
from lmcompress.families.weights import modules_by_path
from lmcompress.method import Method
from lmcompress.numerics import padding
from lmcompress.numerics.activations import initial_step, learned
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.observers import MinMax
from lmcompress.numerics.packing import dequantize
from lmcompress.numerics.quantizers.learned import dynamic_scaling
from lmcompress.numerics.quantizers.registry import QUANTIZERS
from lmcompress.pruning.structured.gates import Gates
from lmcompress.quantization import ActivationScheme, FakeQuantized, QuantizationConfig, Rule, WeightScheme, plan

NO_ACTIVATIONS = dict(activations=None, attention=False)
EIGHT = WeightScheme(quantizer="minmax", bits=8, granularity="row")
STATIC, LEARNED = ActivationScheme(range="static"), ActivationScheme(range="learned")


def faked(model, batches=None, **config):
    return FakeQuantized(model, plan(model, QuantizationConfig(**config)), batches)


def relative_error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def inputs_of(model, *, raw=False):
    """What every matrix reads (raw: before it is quantized) and gives, by name, for the usual batch."""
    read, given, handles = {}, {}, []
    for name, module in model.named_modules():
        if hasattr(module, "weight") or hasattr(module, "embedding"):
            before = lambda module, args, name=name: read.__setitem__(name, args[0])  # noqa: E731
            after = lambda module, args, output, name=name: given.__setitem__(name, output)  # noqa: E731
            handles += [module.register_forward_pre_hook(before, prepend=raw), module.register_forward_hook(after)]
    outputs(model)
    for handle in handles:
        handle.remove()
    return {name: (read[name], given[name]) for name in given}


# --- switched off, taken away


def test_off_it_computes_what_the_model_did_to_the_bit_and_on_something_near(family):
    model = make(family, "language")
    expected = outputs(model)
    fake = faked(model, weights=EIGHT, embeddings=EIGHT)
    got = outputs(model)
    assert 0 < relative_error(got, expected) < 0.2
    fake.set_enabled(False)
    assert torch.equal(outputs(model), expected)
    fake.set_enabled(True, "weights")
    weights_only = outputs(model)
    fake.set_enabled(True)
    assert torch.equal(outputs(model), got) and not torch.equal(weights_only, got)
    fake.remove()
    fake.remove()
    assert torch.equal(outputs(model), expected)
    assert type(model) is type(make(family, "language"))
    assert all("FakeQuantized" not in type(module).__name__ for module in model.modules())


def test_names_and_values_of_the_parameters_stay(family):
    model = make(family, "language")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    faked(model, [inputs(model)], activations=LEARNED)
    assert [name for name, _ in model.named_parameters()] == names
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


# --- weights


def test_every_reader_of_a_weight_gets_what_its_codes_stand_for(family):
    model = make(family, "language")
    fake = faked(model, **NO_ACTIVATIONS)
    modules = modules_by_path(model)
    for planned in fake.plan.matrices:
        quantized = fake.quantized()[planned.path]
        values = dequantize(quantized.codes, quantized.scales, granularity=quantized.granularity)
        for path in (planned.path, *planned.tied):
            weight = modules[path].weight
            assert torch.equal(weight.t() if is_conv1d(modules[path]) else weight, values)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("granularity", ["tensor", "row", 8])
def test_a_quantized_model_is_the_model_with_quantized_weights(quantizer, granularity):
    bits = 2 if 2 in QUANTIZERS[quantizer].bits else QUANTIZERS[quantizer].bits[0]
    scheme = WeightScheme(quantizer=quantizer, bits=bits, granularity=granularity)
    model = make("gpt2", "language")
    fake = faked(model, weights=scheme, embeddings=scheme, **NO_ACTIVATIONS)
    got = outputs(model)
    values = {path: quantized.values for path, quantized in fake.quantized().items()}
    fake.remove()
    for path, module in modules_by_path(model).items():
        if path in values:
            module.weight.data = values[path].t().contiguous() if is_conv1d(module) else values[path]
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(outputs(model), got, rtol=1e-5, atol=1e-6)


def test_a_tied_matrix_is_quantized_once_for_each_forward_pass_and_learns_from_both_uses(monkeypatch):
    model = make("gpt2", "language")
    fake = faked(model, **NO_ACTIVATIONS)
    words, calls = fake.weights["wte"], []
    quantize = type(words).quantize
    monkeypatch.setattr(type(words), "quantize", lambda self, w: calls.append(self.path) or quantize(self, w))
    batch = inputs(model)
    for _ in range(2):
        calls.clear()
        model.zero_grad()
        for scale in fake.parameters():
            scale.grad = None
        model(**batch).logits.square().sum().backward()
        assert calls.count("wte") == 1
    both = fake.parameter("wte").grad.clone(), words.state.grad.clone()

    # the same by hand: one tensor of quantized values for both uses
    fake.remove()
    stored = fake.parameter("wte")
    stored.grad = None
    other = faked(model, rules=(Rule(modules="embeddings", weights=None),), **NO_ACTIVATIONS)
    gamma = words.state.detach().clone().requires_grad_()
    values = dynamic_scaling(stored, gamma, bits=8, granularity=words.scheme.grouping()).values
    for module in (model.transformer.wte, model.lm_head):
        del module.weight
        module.weight = values
    model(**batch).logits.square().sum().backward()
    torch.testing.assert_close((stored.grad, gamma.grad), both, rtol=1e-4, atol=1e-4)
    other.remove()


def test_looking_words_up_quantizes_these_alone_and_teaches_the_same():
    results = []
    for alone in (True, False):
        model = make("bert", "classification")
        fake = faked(model, embeddings=WeightScheme(quantizer="lsq", bits=4, granularity="row"), **NO_ACTIVATIONS)
        words = fake.weights["embeddings.word_embeddings"]
        if not alone:
            words.shared = words.in_pass = True
        assert (words.rows(fake.parameter(words.path), torch.tensor([3, 5]), 0) is not None) == alone
        model(**inputs(model)).logits.square().sum().backward()
        results.append((words.state.grad, fake.parameter(words.path).grad))
    assert results[0][0].count_nonzero() > 5
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantizer", sorted(q for q in QUANTIZERS if QUANTIZERS[q].learned))
def test_everything_that_is_learned_gets_a_gradient(family, quantizer):
    scheme = WeightScheme(quantizer=quantizer, bits=4)
    model = make(family, "language").train()
    fake = faked(
        model,
        [inputs(model)],
        weights=scheme,
        embeddings=scheme.model_copy(update={"granularity": "row"}),
        activations=LEARNED,
    )
    model(**inputs(model)).logits.square().sum().backward()
    assert len(fake.scales()) == len(fake.parameters()) > len(fake.plan.matrices)
    for name, scale in fake.scales().items():
        assert scale.grad is not None and torch.isfinite(scale.grad).all(), name
    assert all(fake.parameter(path).grad is not None for path in fake.weights)
    assert not {id(p) for p in fake.parameters()} & {id(p) for p in model.parameters()}


def test_values_follow_the_weights_and_the_scales():
    model = make("bert", "classification")
    fake = faked(model, **NO_ACTIVATIONS)
    seen = [outputs(model)]
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.mul_(1.5)
    seen.append(outputs(model))
    with torch.no_grad():
        for path in fake.weights:
            fake.parameter(path).mul_(0.5)
    seen.append(outputs(model))
    fake.set_bits(2)
    seen.append(outputs(model))
    for one, other in itertools.combinations(seen, 2):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_values_follow_what_is_written_without_a_trace(name):
    model = make(name, "language")
    fake = faked(model, **NO_ACTIVATIONS)
    outputs(model)
    model(**inputs(model)).logits.sum().backward()
    # as moving averages of weights do
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    with torch.no_grad():
        fake.parameters()[0].data.mul_(1.5)
    weights = {path: fake.quantized()[path].values for path in fake.weights}
    for module in model.modules():
        path = module.__dict__["_fake_weight"].path if "_fake_weight" in module.__dict__ else None
        if path is not None:
            read = module.weight.t() if is_conv1d(module) else module.weight
            assert torch.equal(read, weights[path])
    got = outputs(model)
    other = make(name, "language")
    other.load_state_dict(model.state_dict())
    again = faked(other, **NO_ACTIVATIONS)
    with torch.no_grad():
        again.parameters()[0].copy_(fake.parameters()[0])
    assert torch.equal(got, outputs(other))


def test_weights_are_quantized_in_every_pass_unless_they_are_held(monkeypatch):
    model = make("gpt2", "language")
    fake, calls = faked(model, **NO_ACTIVATIONS), []
    kind = type(fake.weights["wte"])
    quantize = kind.quantize
    monkeypatch.setattr(kind, "quantize", lambda self, w: calls.append(self.path) or quantize(self, w))
    wanted = outputs(model)
    # the tied matrix once, too
    assert sorted(calls) == sorted(fake.weights)
    with fake.holding():
        for _ in range(3):
            assert torch.equal(outputs(model), wanted)
        assert len(calls) == 2 * len(fake.weights)
        model(**inputs(model)).logits.sum().backward()
        model(**inputs(model)).logits.sum().backward()
    calls.clear()
    outputs(model)
    assert len(calls) == len(fake.weights)
    assert all(weight._kept is None for weight in fake.weights.values())


@pytest.mark.parametrize("activations", [ActivationScheme(), STATIC, LEARNED], ids=["dynamic", "static", "learned"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_copy_is_fake_quantized_by_quantizers_of_its_own(name, activations):
    model = make(name, "language")
    fake = faked(model, [inputs(model)], activations=activations)
    wanted = outputs(model)
    # with a graph that no copy can have
    model(**inputs(model)).logits.sum()
    other = copy.deepcopy(model)
    assert torch.equal(outputs(other), wanted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    changed = outputs(other)
    assert torch.equal(outputs(model), wanted) and not torch.equal(changed, wanted)
    fake.set_bits(2)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.mul_(1.5)
    assert torch.equal(outputs(other), changed) and not torch.equal(outputs(model), wanted)
    fake.remove()
    assert torch.equal(outputs(other), changed)


def test_two_backward_passes_in_a_row_and_evaluation_in_between():
    model = make("gpt2", "language").train()
    faked(model)
    for _ in range(2):
        model(**inputs(model)).logits.sum().backward()
        outputs(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    results = []
    for reentrant in (None, True, False):
        model = make("gpt2", "language").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        fake = faked(model, [inputs(model)], activations=LEARNED)
        model(**inputs(model), use_cache=False).logits.square().sum().backward()
        results.append([p.grad for p in (*fake.parameters(), *model.parameters())])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_quantizers_compute_in_float32_under_autocast():
    model = make("gpt2", "language")
    fake = faked(model)
    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fake.weights["h.0.attn.c_attn"].forget()
        again = model.transformer.h[0].attn.c_attn.weight
        x = torch.randn(2, 3, 16)
        inside = fake.activations["h.0.attn.c_attn.input"](x)
        got = model(**inputs(model)).logits.float()
    assert again.dtype == torch.float32 and torch.equal(again, weight)
    assert torch.equal(inside, fake.activations["h.0.attn.c_attn.input"](x))
    assert relative_error(got, outputs(model)) < 0.1


def test_a_model_in_bfloat16_computes_in_bfloat16():
    model = make("bert", "classification").bfloat16()
    faked(model, [inputs(model)], activations=STATIC)
    assert outputs(model).dtype == torch.bfloat16 and torch.isfinite(outputs(model)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_quantized_too():
    model = make("bert", "classification")
    expected_dense = outputs(model)
    faked(model, weights=EIGHT)
    compiled = torch.compile(model, backend="eager")
    got = outputs(compiled)
    torch.testing.assert_close(got, outputs(model), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(got, expected_dense, rtol=1e-5, atol=1e-6)


# --- schedules, curvature


def test_fewer_bits_begin_anew_and_keep_the_parameters():
    model = make("gpt2", "language")
    scheme = WeightScheme(quantizer="lsq", bits=8)
    fake = faked(model, weights=scheme, embeddings=scheme, **NO_ACTIVATIONS)
    same = fake.parameters()
    fake.set_bits(4, "ffn_*")
    fake.set_bits(2, "h.0.mlp.c_fc")
    assert {path: f.scheme.bits for path, f in fake.weights.items() if path.startswith("h.0")} == {
        "h.0.attn.c_attn": 8,
        "h.0.attn.c_proj": 8,
        "h.0.mlp.c_fc": 2,
        "h.0.mlp.c_proj": 4,
    }
    assert all(one is other for one, other in zip(fake.parameters(), same, strict=True))
    fresh = faked(make("gpt2", "language"), weights=WeightScheme(quantizer="lsq", bits=2), **NO_ACTIVATIONS)
    assert torch.equal(fake.scales()["h.0.mlp.c_fc"], fresh.scales()["h.0.mlp.c_fc"])
    assert len(fake.quantized()["h.0.mlp.c_fc"].codes.unique()) <= 4
    with pytest.raises(LmcompressError, match="no quantized matrix is named 'ffn_inn'"):
        fake.set_bits(4, "ffn_inn")
    with pytest.raises(LmcompressError, match="'lsq' has bits"):
        fake.set_bits(1)


def test_curvature_moves_the_scales_of_laq_and_of_nothing_else():
    model = make("gpt2", "language")
    scheme = WeightScheme(quantizer="laq", bits=2)
    fake = faked(model, weights=scheme, **NO_ACTIVATIONS)
    path = "h.0.mlp.c_fc"
    before, stored = outputs(model), fake.parameter(path)
    curvature = torch.zeros_like(stored)
    curvature[:, 3] = 1.0
    fake.set_curvature({path: curvature})
    third = stored[:, 3].detach()
    alpha = float(fake.quantized()[path].scales)
    kept = third.abs() > alpha / 2
    assert alpha == pytest.approx(float(third[kept].abs().mean()), rel=1e-2)
    assert not torch.equal(outputs(model), before)
    fake.set_curvature({path: None})
    assert torch.equal(outputs(model), before)
    with pytest.raises(LmcompressError, match=r"must have the shape of the parameter, \(16, 24\)"):
        fake.set_curvature({path: curvature.t()})
    with pytest.raises(LmcompressError, match="such as 'laq', got one for wte"):
        fake.set_curvature({"wte": torch.ones(64, 16)})
    with pytest.raises(LmcompressError, match="no quantized matrix has the path 'wpe'"):
        fake.set_curvature({"wpe": torch.ones(1)})


# --- activations


def test_inputs_are_quantized_where_the_plan_says(family):
    model = make(family, "language")
    fake = faked(model, activations=ActivationScheme(bits=4))
    seen = {name.removeprefix(f"{model.base_model_prefix}."): tensors for name, tensors in inputs_of(model).items()}
    for path, activation in fake.inputs.items():
        # within a forward hook the input is what came out of the pre-hooks
        readers = [path] if path != fake.plan.matrices[0].path else list(fake.plan.matrices[0].tied)
        for reader in readers:
            assert len(seen[reader][0].unique()) <= 16, activation.name
    # embeddings that no head is tied to read ids
    assert len(fake.inputs) == len(fake.plan.matrices) - (family.name == "llama")


def test_query_key_and_value_read_one_quantized_tensor(monkeypatch):
    model = make("bert", "classification")
    fake = faked(model, [inputs(model)], activations=LEARNED)
    assert sum("query.input" in name for name in fake.activations) == 3
    assert not any("key.input" in name or "value.input" in name for name in fake.activations)
    seen = inputs_of(model)
    prefix = "bert.encoder.layer.1.attention.self."
    assert seen[prefix + "query"][0] is seen[prefix + "key"][0] is seen[prefix + "value"][0]


def test_calibration_sees_what_the_model_computes_without_padding():
    model = make("bert", "classification")
    batches = [inputs(model, seed=seed) for seed in range(3)]
    fake = faked(model, **NO_ACTIVATIONS)
    seen = {}
    for batch in batches:
        inner = {}
        hook = model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(
            lambda module, args, inner=inner: inner.update(x=args[0])
        )
        with torch.no_grad():
            model(**batch)
        hook.remove()
        seen.setdefault("x", []).append(inner["x"][batch["attention_mask"].bool()])
    fake.remove()
    x = torch.cat(seen["x"])
    fake = faked(model, batches, activations=STATIC)
    encoding, (scale, zero_point) = fake.activations["encoder.layer.1.output.dense.input"].final()
    expected = static_range(*MinMax().updated(x).range(), encoding)
    torch.testing.assert_close((scale, zero_point), expected)
    fake.remove()
    fake = faked(model, batches, activations=ActivationScheme(range="learned", symmetric=True))
    step = fake.scales()["encoder.layer.1.output.dense.input.step"]
    torch.testing.assert_close(step.detach(), initial_step(x))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
def test_padding_does_not_move_ranges(name, calibration):
    ranges = []
    for filler in (1, 7):
        model = make(name, "language")
        batch = inputs(model)
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], filler)
        fake = faked(model, [batch], activations=ActivationScheme(range="static", calibration=calibration))
        ranges.append({name: activation.final()[1] for name, activation in fake.activations.items()})
    assert ranges[0].keys() == ranges[1].keys()
    for name in ranges[0]:
        torch.testing.assert_close(ranges[0][name], ranges[1][name])


def test_the_mode_and_the_switches_are_as_they_were_after_calibration():
    model = make("bert", "classification").train()
    fake = faked(model, [inputs(model)], activations=STATIC)
    assert model.training
    fake.set_enabled(False, "activations")
    fake.calibrate([inputs(model, seed=1)])
    assert not any(activation.enabled for activation in fake.activations.values())


def test_calibration_without_data_is_refused_and_the_model_is_as_it_was():
    model = make("bert", "classification")
    expected = outputs(model)
    with pytest.raises(LmcompressError, match="calibration needs data"):
        faked(model, [], activations=STATIC)
    assert torch.equal(outputs(model), expected)
    faked(model, activations=STATIC)
    with pytest.raises(LmcompressError, match="must be calibrated first"):
        outputs(model)


def test_an_activation_that_is_nothing_but_zeros_is_named():
    model = make("bert", "classification")
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[0].intermediate.dense.parameters():
            parameter.zero_()
    rules = (Rule(modules="encoder.layer.0.intermediate.dense", weights=None),)
    for scheme in (STATIC, LEARNED):
        with pytest.raises(LmcompressError, match="encoder.layer.0.output.dense.input: .* wider than zero"):
            faked(model, [inputs(model)], activations=scheme, rules=rules)


# --- state


def states(fake):
    return {name: tensor.clone() for name, tensor in fake.state.state_dict().items()}


def moved(fake, model):
    """Weights and scales as training might leave them."""
    with torch.no_grad():
        for parameter in (*model.parameters(), *fake.parameters()):
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


@pytest.mark.parametrize("scheme", [ActivationScheme(), STATIC, LEARNED])
def test_state_goes_through_state_dicts(scheme):
    model = make("gpt2", "language")
    fake = faked(model, [inputs(model)], activations=scheme)
    moved(fake, model)
    expected = outputs(model)
    other = make("gpt2", "language", seed=1)
    loaded = faked(other, activations=scheme)
    other.load_state_dict(model.state_dict())
    loaded.state.load_state_dict(fake.state.state_dict())
    assert torch.equal(outputs(other), expected)


@pytest.mark.parametrize("scheme", [ActivationScheme(), LEARNED])
def test_copies_stand_alone(family, scheme):
    model = make(family, "language")
    fake = faked(model, [inputs(model)], activations=scheme)
    model.train()(**inputs(model)).logits.sum().backward()
    model.eval()
    expected = outputs(model)
    copied, handle = copy.deepcopy(model), copy.deepcopy(fake)
    assert handle.model is not model
    moved(fake, model)
    assert not torch.equal(outputs(model), expected)
    assert torch.equal(outputs(copied), expected) and torch.equal(outputs(handle.model), expected)
    moved(handle, handle.model)
    assert not torch.equal(outputs(handle.model), expected)
    handle.remove()
    assert not any("FakeQuantized" in type(module).__name__ for module in handle.model.modules())
    revived = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(revived), outputs(model))


class Rows(Dataset):
    def __init__(self, model):
        batch = inputs(model, rows=8)
        self.rows = [{k: v[i] for k, v in batch.items()} | {"labels": batch["input_ids"][i]} for i in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Quantizing(Method):
    """The least of a method: its scales are trained beside the model."""

    name, max_norm = "quantization", None

    def prepare(self, trainer):
        self.fake = faked(trainer.student, [inputs(trainer.student)], activations=LEARNED)

    def before_forward(self, step):
        pass

    def loss_terms(self, step):
        return {}

    def label_weight(self, progress):
        return 1.0

    def parameter_groups(self):
        return [{"params": self.fake.parameters(), "lr": 1e-2}]

    def modules(self):
        return {"quantizers": self.fake.state}

    def set_active(self, active):
        pass

    def finish(self):
        self.fake.remove()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_resumes_to_the_bit_and_its_checkpoints_are_ordinary_ones(tmp_path):
    from lmcompress.trainers import CompressionTrainer

    def train(folder, resume=None):
        model, method = make("gpt2", "language"), Quantizing()
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
        )
        trainer = CompressionTrainer(model, arguments, methods=[method], train_dataset=Rows(model))
        start = states(method.fake)
        trainer.train(resume_from_checkpoint=resume)
        assert any(not torch.equal(start[name], tensor) for name, tensor in states(method.fake).items())
        return model, method

    model, method = train(tmp_path / "whole")
    again, resumed = train(tmp_path / "rest", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(tensor, states(resumed.fake)[name]) for name, tensor in states(method.fake).items())
    assert torch.equal(outputs(again.eval()), outputs(model.eval()))
    stock = type(model).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    method.finish()
    assert torch.equal(outputs(stock.eval()), outputs(model))


# --- together with pruning


def test_gates_put_before_it_act_on_what_is_quantized():
    model = make("bert", "classification")
    gates = Gates(model, ("neurons",))
    values = gates.values().map(lambda ones: ones * (torch.arange(ones.shape[-1]) % 2))
    gates.set(values)
    fake = faked(model, weights=EIGHT, embeddings=EIGHT)
    seen = inputs_of(model)["bert.encoder.layer.0.output.dense"][0]
    assert not seen[..., ::2].any() and len(seen.unique()) > 20
    assert fake.parameters() == []


# --- refused


def test_what_cannot_be_is_refused_before_the_model_is_changed():
    model = make("bert", "classification")
    made = plan(model, QuantizationConfig())
    with pytest.raises(LmcompressError, match="the plan must be of this model, got one with a matrix"):
        FakeQuantized(make("gpt2", "classification"), made)
    fake = FakeQuantized(model, made)
    with pytest.raises(LmcompressError, match="fake-quantized already"):
        FakeQuantized(model, made)
    with pytest.raises(LmcompressError, match="no quantized matrix has the path"):
        fake.parameter("pooler.dense")
    fake.remove()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(LmcompressError, match=r"weights of encoder.layer.2.output.dense must be finite"):
        FakeQuantized(model, made)
    assert not any("FakeQuantized" in type(module).__name__ for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_a_weight_that_was_taken_away_is_named():
    model = make("bert", "classification")
    fake = faked(model, **NO_ACTIVATIONS)
    dense = model.bert.encoder.layer[0].output.dense
    kept, dense._parameters["weight"] = dense._parameters["weight"], None
    for read in (lambda: outputs(model), lambda: fake.parameter("encoder.layer.0.output.dense")):
        with pytest.raises(LmcompressError, match=r"encoder.layer.0.output.dense must keep the weight that was fake"):
            read()
    dense._parameters["weight"] = kept
    outputs(model)


# --- packed


def check_finish(fake, model, folder=None):
    """Packed, each product is what it was for the same input; so are the logits, but for what rounds the other way."""
    products, expected = inputs_of(model, raw=True), outputs(model)
    encoders = [(activation, activation.final()) for activation in fake.activations.values()]
    fake.finish()
    assert all(encoding.range != "learned" for _, (encoding, _) in encoders)
    modules = dict(model.named_modules())
    with torch.no_grad(), padding.stated(inputs(model)["attention_mask"].bool()):
        for name, (x, y) in products.items():
            torch.testing.assert_close(
                modules[name](x), y, rtol=1e-5, atol=1e-5 * float(y.norm(p=torch.inf) if y.numel() else 0), msg=name
            )
    got = outputs(model)
    # a sum in another order may put an activation on the other side of a half: one level of one number
    assert float((got - expected).abs().mean() / expected.abs().mean()) < 2e-2
    if folder is not None:
        CompressedModel(model).save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder).eval()
        assert torch.equal(outputs(reloaded), got)
    return got, expected


@pytest.mark.parametrize(("head", "bits"), [("language", 8), ("classification", 4), ("language", 2)])
def test_weights_alone_are_packed_as_they_were_trained(family, head, bits, tmp_path):
    model = make(family, head)
    fake = faked(
        model,
        weights=WeightScheme(bits=bits),
        embeddings=WeightScheme(bits=bits, granularity="row"),
        **NO_ACTIVATIONS,
    )
    moved(fake, model)
    got, expected = check_finish(fake, model, tmp_path / "packed")
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_quantizer_is_packed_as_it_was_trained(name, quantizer):
    bits = QUANTIZERS[quantizer].bits[-1]
    scheme = WeightScheme(quantizer=quantizer, bits=bits, granularity="row")
    model = make(name, "language")
    fake = faked(model, weights=scheme.model_copy(update={"granularity": 8}), embeddings=scheme, **NO_ACTIVATIONS)
    moved(fake, model)
    got, expected = check_finish(fake, model)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(
    "scheme",
    [
        ActivationScheme(),
        ActivationScheme(granularity="token", clip=2.5),
        ActivationScheme(range="static", calibration="percentile"),
        ActivationScheme(range="static", bits=4, symmetric=True),
        LEARNED,
        ActivationScheme(range="learned", symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "cut"), [("bert", None), ("gpt2", cut_to_nothing), ("electra-projected", cut_unevenly)]
)
def test_activations_are_packed_as_they_were_trained(name, cut, scheme, tmp_path):
    model = make(name, "language")
    if cut is not None:
        cut(model)
    fake = faked(model, [inputs(model)], activations=scheme)
    moved(fake, model)
    check_finish(fake, model, tmp_path / "packed")


def test_what_cannot_be_packed_leaves_the_model_as_it_was():
    model = make("gpt2", "language")
    fake = faked(model, activations=STATIC)
    with pytest.raises(LmcompressError, match="must be calibrated first"):
        fake.finish()
    fake.calibrate([inputs(model)])
    with torch.no_grad():
        fake.parameter("h.1.mlp.c_fc")[0, 0] = torch.inf
    with pytest.raises(LmcompressError, match="must be finite"):
        fake.finish()
    assert sum("FakeQuantized" in type(module).__name__ for module in model.modules()) == len(fake.weights) + 1
    with torch.no_grad():
        fake.parameter("h.1.mlp.c_fc")[0, 0] = 0.0
    fake.finish()
    assert torch.isfinite(outputs(model)).all()


def test_learned_ranges_are_what_the_packed_model_has():
    model = make("bert", "classification")
    fake = faked(model, [inputs(model)], activations=LEARNED)
    moved(fake, model)
    activation = fake.activations["encoder.layer.0.attention.self.query.input"]
    encoding, (scale, zero_point) = activation.final()
    assert encoding.full and zero_point is None
    x = torch.randn(2, 3, 16) * 5
    assert torch.equal(learned(x, activation.step).values, activation(x))
    assert torch.equal(scale, activation.step.detach()[0])
    fake.finish()
    packed = anatomy_of(model).blocks[0].get("query")
    assert float(packed.input_scale) == float(scale)
