"""Quantization without training: what is packed computes what was measured, and errors come before work."""

import copy
import json

import pytest
import torch
from families import FAMILIES, LAYERS, cut_to_nothing, cut_unevenly, inputs, make, outputs

from lmcompress.activations.hessian import output_error
from lmcompress.checkpoint.encoding import packed_modules, unpacked
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, weight_view
from lmcompress.kernels.dispatch import using
from lmcompress.model import CompressedModel
from lmcompress.numerics.inputs import quantize_input
from lmcompress.numerics.quantizers import ranges
from lmcompress.quantization.config import ActivationScheme, QuantizationConfig, Rule, WeightScheme
from lmcompress.quantization.ptq import POST_TRAINING, quantize

# min-max and not the least squared error, for the sake of time
BY_ROW = WeightScheme(quantizer="minmax", granularity="row")
EIGHT = POST_TRAINING.model_copy(update={"weights": BY_ROW, "embeddings": BY_ROW})
FOUR, TWO = (BY_ROW.model_copy(update={"bits": bits}) for bits in (4, 2))
WEIGHTS_ONLY = QuantizationConfig(weights=FOUR, embeddings=FOUR, activations=None, attention=False)
STATIC = EIGHT.model_copy(update={"activations": ActivationScheme(range="static"), "attention": True})
BY_TOKEN = ActivationScheme(granularity="token")
METHODS = ["rtn", "gptq", "awq"]


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def batches_for(model, count=4):
    return [inputs(model, rows=4, seed=seed) for seed in range(1, count + 1)]


def relative(a, b):
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("method, head", list(zip(METHODS, ["base", "classification", "language"], strict=True)))
@pytest.mark.parametrize("config", [EIGHT, STATIC], ids=["dynamic", "static"])
def test_every_family_is_packed_and_answers_nearly_the_same(family, head, config, method):
    model = make(family, head)
    dense = outputs(model)
    report = quantize(model, config, batches_for(model), method=method)
    assert relative(outputs(model), dense) < 0.01
    packed = dict(packed_modules(model))
    assert [row.path for row in report.matrices] == list(packed) and len(packed) >= 4 * LAYERS
    for row in report.matrices:
        assert row.bytes_after == sum(t.numel() * t.element_size() for t in packed[row.path].buffers())
        assert row.bytes_before == 4 * row.weights
        assert 0 <= row.error < 0.01
    assert report.hidden_error < 0.01
    assert report.bytes_before - report.bytes_after == pytest.approx(
        sum(row.bytes_before - row.bytes_after for row in report.matrices), abs=100 * LAYERS
    )
    json.dumps(report.to_dict())
    assert report.matrices[-1].part in str(report) and "MiB" in str(report)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [cut_unevenly, cut_to_nothing], ids=["unevenly", "to-nothing"])
def test_pruned_models_are_quantized(family, cut, method):
    model = cut(make(family))
    dense = outputs(model)
    # what a gate multiplies has outliers, and one range for all tokens would have to hold them
    config = EIGHT.model_copy(update={"activations": BY_TOKEN}) if family.name == "llama" else EIGHT
    report = quantize(model, config, batches_for(model, 2), method=method)
    assert relative(outputs(model), dense) < 0.01
    if cut is cut_to_nothing:
        assert any("pruned to nothing" in reason for reason in report.dense.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_loaded_model_is_the_packed_one(method, tmp_path):
    model = CompressedModel(make("gpt2", "language"))
    quantize(model, STATIC, batches_for(model.model), method=method)
    before = outputs(model.model)
    model.save_pretrained(tmp_path)
    after = outputs(CompressedModel.from_pretrained(tmp_path).model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def recorded(model, batches, modules):
    """What modules read at valid tokens."""
    seen = {module: [] for module in modules}
    handles = [m.register_forward_pre_hook(lambda module, args: seen[module].append(args[0].detach())) for m in modules]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {m: torch.cat([x[mask] for x, mask in zip(xs, masks, strict=True)]) for m, xs in seen.items()}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_errors_are_those_of_what_each_module_gives_for_its_inputs_in_the_packed_model(family, method):
    model = make(family)
    batches, dense = batches_for(model), copy.deepcopy(model)
    report = quantize(model, EIGHT, batches, method=method, output_errors=method != "gptq")
    rows = {row.path: row for row in report.matrices}
    packed = {path: m for path, m in packed_modules(model) if rows[path].part != "embeddings"}
    originals = {path: dense.base_model.get_submodule(path) for path in packed}
    read = recorded(model, batches, list(packed.values()))
    for path, module in packed.items():
        x = read[module]
        # ranges are of a batch with its padding; of tokens alone they may be narrower, by little
        x = quantize_input(x, module.inputs).values.double()
        weight = weight_view(originals[path]).detach()
        error = output_error(weight, module.dequantized(), x.T @ x).sum()
        norm = output_error(weight, torch.zeros_like(weight), x.T @ x).sum()
        assert rows[path].measured == "output"
        assert rows[path].error == pytest.approx(float(error / norm), rel=0.05)


def test_the_error_of_the_hidden_states_is_that_of_the_whole_model(family):
    model = make(family, "base")
    batches, dense = batches_for(model), copy.deepcopy(model)
    report = quantize(model, EIGHT, batches, method="gptq")

    def last(m):
        return recorded_outputs(m, batches, anatomy_of(m).blocks[-1].module)

    # the walk multiplies floats as the reference does; for an integer kernel an input on the edge of a code may fall on
    # its other side
    with using(kernel="reference"):
        after = last(model)
    assert report.hidden_error == pytest.approx(relative(after, last(dense)), rel=1e-5)
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_errors_of_outputs_change_the_report_and_nothing_else(method):
    cheap, dear = (CompressedModel(make("gpt2", "language")).model for _ in range(2))
    dear.load_state_dict(cheap.state_dict())
    batches = batches_for(cheap)
    reports = [
        quantize(model, STATIC, batches, method=method, output_errors=wanted)
        for model, wanted in ((cheap, False), (dear, True))
    ]
    assert {row.measured for row in reports[0].matrices} == {"weights"}
    assert {row.measured for row in reports[1].matrices if row.part != "embeddings"} == {"output"}
    assert reports[0].hidden_error == reports[1].hidden_error
    for name, tensor in cheap.state_dict().items():
        assert torch.equal(tensor, dear.state_dict()[name]), name


def test_rounding_to_nearest_looks_at_no_more_batches_than_it_measures(monkeypatch):
    monkeypatch.setattr("lmcompress.quantization.ptq.run.MEASURED_TOKENS", 40)
    model = make("bert", "classification")
    batches = batches_for(model, 6)
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    needed = next(n for n in range(1, 7) if sum(tokens[:n]) >= 40)
    assert needed < 6
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    report = quantize(model, EIGHT, batches, method="rtn")
    handle.remove()
    # once before, for what it gives, and once to begin the walk through the blocks
    assert len(seen) == 2 * needed and report.tokens == sum(tokens[:needed])
    other = make("bert", "classification")
    short = quantize(other, EIGHT, batches[:needed], method="rtn")
    assert report.hidden_error == short.hidden_error > 0


def test_errors_of_outputs_need_data():
    with pytest.raises(LmcompressError, match="output_errors=True must have calibration data, got batches=None"):
        quantize(make("bert"), EIGHT, output_errors=True)


def test_scales_are_searched_for_once(monkeypatch):
    searched = []
    search = ranges.search_shares
    monkeypatch.setattr(ranges, "search_shares", lambda *args: searched.append(1) or search(*args))
    report = quantize(make("bert"))
    assert len(searched) == len(report.matrices)


def recorded_outputs(model, batches, module):
    found = []
    handle = module.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_padding_has_no_part_in_anything(family, method):
    config = STATIC.model_copy(update={"attention": False})
    models = [make(family) for _ in range(2)]
    batches = batches_for(models[0])
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 1
        # rows of padding alone as well
        batch["input_ids"] = torch.cat([batch["input_ids"], batch["input_ids"][:1]])
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros_like(batch["attention_mask"][:1])])
    reports = [quantize(m, config, b, method=method) for m, b in zip(models, (batches, other), strict=True)]
    states = [model.state_dict() for model in models]
    for name, tensor in states[0].items():
        if family.name != "roberta":  # whose positions depend on which ids are padding
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert reports[0].tokens == reports[1].tokens


def test_gptq_is_better_than_rounding_where_bits_are_few(family):
    hidden = {}
    for method in ("rtn", "gptq"):
        errors = []
        for seed in range(2):
            model = make(family, "base", seed=seed)
            config = QuantizationConfig(weights=TWO, embeddings=None, activations=None, attention=False)
            report = quantize(model, config, batches_for(model, 6), method=method)
            errors.append(report.hidden_error)
            assert {row.method for row in report.matrices} == {method}
        hidden[method] = sum(errors)
    assert hidden["gptq"] < hidden["rtn"]


def with_outliers(name):
    """Channels of activations that are much greater than others, as large models have them."""
    model = make(name, "base")
    with torch.no_grad():
        for block in anatomy_of(model).blocks:
            for norm in ("ln_1", "ln_2"):
                module = block.module.get_submodule(norm)
                module.weight[::5] *= 12
                module.bias[::5] *= 12
    return model


def test_awq_is_better_than_rounding_where_some_channels_are_great():
    config = QuantizationConfig(
        weights=WeightScheme(quantizer="minmax", bits=3, granularity="row"),
        embeddings=None,
        activations=None,
        attention=False,
    )
    reports = {}
    for method in ("rtn", "awq"):
        model = with_outliers("gpt2")
        reports[method] = quantize(model, config, batches_for(model), method=method, output_errors=True)
    errors = {m: {row.path: row.error for row in report.matrices} for m, report in reports.items()}
    assert errors["awq"]["h.0.attn.c_attn"] < 0.5 * errors["rtn"]["h.0.attn.c_attn"]
    assert reports["awq"].hidden_error < reports["rtn"].hidden_error
    rows = {row.path: row for row in reports["awq"].matrices}
    assert rows["h.0.attn.c_attn"].method == "awq"
    assert rows["h.0.mlp.c_proj"].method == "rtn" and "activation" in rows["h.0.mlp.c_proj"].note


def test_static_ranges_are_those_of_what_enters_and_one_sided_after_the_activation(family):
    model = make(family)
    batches = batches_for(model)
    quantize(model, STATIC.model_copy(update={"attention": False}), batches)
    packed = {path: m for path, m in packed_modules(model) if m.inputs is not None}
    read = recorded(model, batches, list(packed.values()))
    parts = {id(b.get(p)): p for b in anatomy_of(model).blocks for p in ("ffn_out", "attention_out")}
    for module in packed.values():
        x, scale, zero = read[module], module.input_scale, module.input_zero_point
        if parts.get(id(module)) == "ffn_out" and family.name != "llama":
            assert float(scale) == pytest.approx(float(x.max() - x.min().clamp(max=0)) / 255, rel=1e-4)
            assert zero is not None
        else:
            assert float(scale) == pytest.approx(float(x.abs().max()) / 127, rel=1e-4)


def test_rules_reach_what_lies_outside_of_the_blocks():
    model = make("bert")
    rules = (Rule(modules="pooler.dense", weights=FOUR), Rule(modules="classifier", weights=FOUR))
    report = quantize(model, STATIC.model_copy(update={"rules": rules}), batches_for(model), method="gptq")
    rows = {row.path: row for row in report.matrices}
    assert rows["pooler.dense"].method == rows["classifier"].method == "gptq"
    model = make("electra-projected")
    rules = (Rule(modules="embedding_projection", weights=FOUR),)
    report = quantize(model, WEIGHTS_ONLY.model_copy(update={"rules": rules}), batches_for(model), method="gptq")
    assert [row.method for row in report.matrices if row.part == "embedding_projection"] == ["gptq"]


def test_without_data_weights_are_rounded_to_nearest(family):
    model = make(family, "language")
    dense = copy.deepcopy(model)
    report = quantize(model, POST_TRAINING)
    assert report.hidden_error is None and {row.measured for row in report.matrices} == {"weights"}
    flat = unpacked(model)
    for row in report.matrices:
        module, old = (m.base_model.get_submodule(row.path) for m in (flat, dense))
        expected = POST_TRAINING.weights.rounded(weight_view(old)).values
        assert torch.equal(weight_view(module), expected)


def test_chunked_feed_forward_networks_are_the_same():
    reports = []
    for size in (0, 3):
        model = make("bert", chunk_size_feed_forward=size)
        reports.append(quantize(model, EIGHT, batches_for(model), method="gptq"))
        assert all(block.module.chunk_size_feed_forward == size for block in anatomy_of(model).blocks)
    assert [row.error for row in reports[0].matrices] == pytest.approx([row.error for row in reports[1].matrices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(dtype, method):
    model = make("gpt2", "language").to(dtype)
    dense = outputs(model).float()
    quantize(model, EIGHT, batches_for(model), method=method)
    assert relative(outputs(model).float(), dense) < 0.05


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_what_fails_on_the_way_leaves_the_model_as_it_was(method, monkeypatch):
    model = make("gpt2", "language")
    before, answer = state(model), outputs(model)
    batches = batches_for(model)
    monkeypatch.setattr("lmcompress.quantization.packing.pack_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, STATIC, batches, method=method)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(outputs(model), answer)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class TestRefusals:
    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_methods_without_data(self, method):
        with pytest.raises(LmcompressError, match=f"method '{method}' must have calibration data, got batches=None"):
            quantize(make("bert"), EIGHT, method=method)

    def test_static_ranges_without_data(self):
        with pytest.raises(LmcompressError, match="the static range of .* must have calibration data"):
            quantize(make("bert"), STATIC)
        config = QuantizationConfig(
            weights=FOUR, embeddings=None, activations=ActivationScheme(range="static"), rules=(), attention=True
        )
        with pytest.raises(LmcompressError, match="must have calibration data"):
            quantize(make("gpt2"), config)

    def test_data_of_nothing(self):
        model = make("bert")
        with pytest.raises(LmcompressError, match="at least one batch, got none"):
            quantize(model, EIGHT, [], method="gptq")
        padding = inputs(model)
        padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
        with pytest.raises(LmcompressError, match="must have tokens, got 1 batches of padding only"):
            quantize(model, EIGHT, [padding], method="gptq")
        with pytest.raises(LmcompressError, match="must have input_ids or inputs_embeds, got attention_mask"):
            quantize(model, EIGHT, [{"attention_mask": padding["attention_mask"]}])

    @pytest.mark.parametrize("method", METHODS)
    def test_weights_that_are_not_finite(self, method):
        model = make("bert")
        with torch.no_grad():
            anatomy_of(model).blocks[1].get("ffn_in").weight[0, 0] = torch.nan
        with pytest.raises(LmcompressError, match=r"encoder.layer.1.intermediate.dense must be finite"):
            quantize(model, EIGHT, batches_for(model), method=method)
        assert not list(packed_modules(model))

    @pytest.mark.parametrize("method", ["rtn", "gptq"])
    def test_activations_that_are_not_finite(self, method):
        model = make("bert")
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.bias[0] = torch.inf
        before = state(model)
        with pytest.raises(LmcompressError, match="finite"):
            quantize(model, STATIC, batches_for(model), method=method)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_what_is_packed_already(self):
        model = make("bert")
        quantize(model)
        with pytest.raises(
            LmcompressError,
            match=r"packed already: quantize the dense one that lmcompress.checkpoint.encoding.unpacked",
        ):
            quantize(model)
        again = unpacked(model)
        quantize(again)
        torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-3, atol=1e-3)

    def test_what_another_library_has_quantized(self):
        model = make("bert")
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(LmcompressError, match="quantized by another library"):
            quantize(model)

    def test_what_learns(self):
        with pytest.raises(LmcompressError, match="must not be one that learns, got 'dynamic_scaling'"):
            quantize(make("bert"), QuantizationConfig())
        config = EIGHT.model_copy(update={"activations": ActivationScheme(range="learned")})
        with pytest.raises(LmcompressError, match="dynamic or static without training, got learned"):
            quantize(make("bert"), config)

    def test_an_unknown_method(self):
        with pytest.raises(LmcompressError, match="unknown method 'gptx'; did you mean 'gptq'"):
            quantize(make("bert"), method="gptx")

    def test_methods_with_nothing_to_do(self):
        config = EIGHT.model_copy(update={"weights": None, "activations": None})
        with pytest.raises(LmcompressError, match="gptq must have matrices beside the embeddings"):
            quantize(make("bert"), config, batches_for(make("bert")), method="gptq")
        dense = Rule(modules="attention_out", weights=None)
        config = EIGHT.model_copy(update={"rules": (dense,)})
        with pytest.raises(LmcompressError, match="input can be scaled exactly, got none: in a .* attention_out"):
            quantize(make("bert"), config, batches_for(make("bert")), method="awq")
