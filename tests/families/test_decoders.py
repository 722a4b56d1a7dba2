"""decoders of today: grouped queries, rotary positions, gates, RMSNorm; what is masked is cut is reloaded."""

import json

import pytest
import torch
from decoders import MODERN, modern
from families import inputs, outputs
from transformers import AutoModel, AutoModelForCausalLM

from lmcompress import CompressedModel
from lmcompress.checkpoint.cutting import keep_heads, keep_layers, keep_neurons
from lmcompress.checkpoint.encoding import unpacked
from lmcompress.checkpoint.structure import stock_structure, structure_of, why_not_vanilla
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, in_features, weight_view
from lmcompress.families.coupled import ROLES
from lmcompress.nn.packed import Packed
from lmcompress.pruning import PARTS, Gates, Units, cut, fold, full
from lmcompress.quantization import POST_TRAINING, Rule, quantize
from lmcompress.quantization.ptq.awq import scalings, why_unscaled
from lmcompress.students import fold_shuffles, group


def close(actual, expected, share=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * max(float(expected.abs().max()), 1.0))


def every_other(model, part):
    return full(model, [part]).map(lambda ones: torch.arange(len(ones)) % 2 == 0)


@pytest.fixture(params=MODERN)
def name(request):
    return request.param


@pytest.mark.parametrize("part", PARTS)
def test_masked_is_cut_is_reloaded(name, part, tmp_path):
    model = modern(name)
    mask = every_other(model, part)
    before = outputs(model)
    with Gates(model, [part]) as gates:
        gates.set(mask)
        masked = outputs(model)
    assert not torch.allclose(masked, before, atol=1e-3)
    cut(model, mask)
    close(outputs(model), masked)
    CompressedModel(model).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(outputs(reloaded), masked)
    assert structure_of(reloaded) == structure_of(model)


@pytest.mark.parametrize("part", ["heads", "neurons", "attention", "ffn", "hidden"])
def test_folded_gates_compute_what_gates_did(name, part):
    model = modern(name)
    values = full(model, [part]).map(lambda ones: torch.linspace(0.5, 1.5, len(ones)))
    with Gates(model, [part]) as gates:
        gates.set(values)
        gated = outputs(model)
    fold(model, values)
    close(outputs(model), gated, 1e-4)


def uneven(model):
    """The model without its second block, with other heads and neurons in the third than in the first; in place."""
    keep_layers(model, [0, 2])
    first, last = anatomy_of(model).blocks
    keep_heads(first, [first.num_heads - 1])
    keep_neurons(last, [1, 3, 4, 7])
    return model


def test_an_uneven_cut_generates_with_a_cache_what_it_does_without(name, tmp_path):
    model = uneven(modern(name))
    CompressedModel(model).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = inputs(model, rows=1)["input_ids"]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, **options), without)
    assert torch.equal(reloaded.generate(ids, use_cache=True, **options), without)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_eight_bits_are_close_packed_and_reloaded(name, method, tmp_path):
    model = uneven(modern(name))
    dense = outputs(model)
    rows = [inputs(model, seed=seed) for seed in range(3)]
    weights_only = POST_TRAINING.model_copy(update={"activations": None})
    quantize(model, weights_only, rows, method=method, progress=False)
    said = outputs(model)
    assert float((said - dense).norm() / dense.norm()) < 0.1
    close(outputs(unpacked(model)), said)
    CompressedModel(model).save_pretrained(tmp_path)
    close(outputs(CompressedModel.from_pretrained(tmp_path)), said)


def test_a_packed_head_is_passed_over_where_the_base_model_is_loaded(tmp_path):
    model = modern("qwen2")
    rules = (Rule(modules="head", activations=None),)
    quantize(model, POST_TRAINING.model_copy(update={"activations": None, "rules": rules}), progress=False)
    assert isinstance(model.lm_head, Packed)
    CompressedModel(model).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    close(outputs(base), outputs(model.model))


def test_what_awq_multiplies_it_divides_elsewhere(name):
    model = modern(name)
    expected = outputs(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in anatomy_of(model).blocks:
            for scaling in scalings(block, lambda parameter, values: parameter.copy_(values)):
                width = in_features(block.get(scaling.parts[0]))
                scales = 0.5 + 2 * torch.rand(width, generator=generator)
                for part in scaling.parts:
                    weight_view(block.get(part)).mul_(scales)
                scaling.divide(scales)
    close(outputs(model), expected, 1e-4)
    scaled = {part for scaling in scalings(block, print) for part in scaling.parts}
    assert scaled == set(block.parts()) - set(why_unscaled(block))


@pytest.mark.parametrize("shuffle", ["channel", "fitted"])
def test_orders_of_neurons_fold_into_all_matrices_before_them(name, shuffle):
    model = modern(name)
    group(model, 2, shuffle=shuffle, parts=["ffn_out"])
    expected = outputs(model)
    report = fold_shuffles(model)
    assert any(path.endswith("input_order") for path in report.changed)
    close(outputs(model), expected)


def test_a_self_loading_checkpoint_needs_no_lmcompress(name, tmp_path, without_lmcompress):
    model = uneven(modern(name))
    if name == "gpt_neox":
        # its head has another name in files
        with pytest.raises(
            LmcompressError,
            match=r"gpt_neox cannot do this \(self_loading\): Transformers changes the name of its head",
        ):
            CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
        return
    CompressedModel(model).save_pretrained(tmp_path / "m", format="self_loading")
    torch.save({"inputs": inputs(model), "expected": outputs(model)}, tmp_path / "said.pt")
    answer = without_lmcompress(
        """
said = torch.load(sys.argv[2], weights_only=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(**said["inputs"]).logits
assert torch.allclose(logits, said["expected"], atol=1e-4), (logits - said["expected"]).abs().max()
""",
        tmp_path / "m",
        tmp_path / "said.pt",
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    auto = json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"]
    assert auto["AutoModelForCausalLM"].endswith("ForCausalLM") and not auto["AutoModel"].endswith("ForCausalLM")


def test_the_rows_of_each_role_are_the_models_own(name):
    """Zeroing the value rows of a head's unit silences exactly that unit's input of the output projection."""
    model = modern(name)
    block = anatomy_of(model).blocks[0]
    owned = [block.rows(role) for role in ROLES]
    widths = {"query": block.head_width, "key": block.head_size, "value": block.head_size}
    for role, (_, rows) in zip(ROLES, owned, strict=True):
        assert len(rows) == block.num_heads * widths[role]
    assert sum(len(rows) for _, rows in owned) == sum(
        coupled.width(block.num_heads) for coupled in block.coupled("heads") if coupled.side == "in"
    )
    part, rows = block.rows("value")
    with torch.no_grad():
        first = rows[: block.head_size]
        weight_view(block.get(part))[first] = 0
        if block.get(part).bias is not None:
            block.get(part).bias[first] = 0
    seen = []
    handle = block.get("attention_out").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model)
    handle.remove()
    units = seen[0].unflatten(-1, (-1, block.head_width))
    assert not units[..., 0, :].any() and units[..., 1:, :].abs().sum(-1).min() > 0


def test_a_stock_model_is_stock(name):
    model = modern(name)
    assert why_not_vanilla(structure_of(model), model.config) is None
    assert structure_of(model) == stock_structure(model.config)


def test_fewer_layers_leave_a_stock_config_with_lists_of_their_length(name, tmp_path):
    model = modern(name)
    keep_layers(model, [0, 2])
    expected = outputs(model)
    CompressedModel(model).save_pretrained(tmp_path, format="vanilla")
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    for field in anatomy_of(model).family.per_layer:
        assert len(getattr(model.config, field)) == 2


def test_the_widths_of_a_uniform_cut_are_stock_where_the_config_can_say_them():
    model = modern("qwen3")
    cut(model, Units(neurons=tuple(torch.arange(24) < 16 for _ in range(3))))
    cut(model, Units(heads=tuple(torch.tensor([False, True]) for _ in range(3))))
    assert why_not_vanilla(structure_of(model), model.config) is None
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)


def test_gemmas_hidden_size_is_never_restated_in_the_config():
    model = modern("gemma")
    cut(model, Units(hidden=torch.arange(16) < 8))
    assert model.config.hidden_size == 16
    assert "multiplies its embeddings" in why_not_vanilla(structure_of(model), model.config)


def test_opt_with_norms_after_its_sub_layers_is_refused():
    model = modern("opt")
    model.config.do_layer_norm_before = False
    with pytest.raises(LmcompressError, match="knows opt with do_layer_norm_before=True.*False"):
        anatomy_of(model)
