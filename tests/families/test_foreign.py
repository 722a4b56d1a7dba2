"""What other libraries put into a model is refused by every verb that changes it, before anything is changed."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import inputs, make, outputs
from torch import nn
from torch.nn.utils import prune as torch_prune
from training import tiny_arguments

from lmcompress import CompressedModel, LmcompressError
from lmcompress.checkpoint.cutting import keep_heads, keep_hidden, keep_layers, keep_neurons
from lmcompress.clustering import SharingConfig, share_weights
from lmcompress.clustering.method import WeightSharing
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.families import anatomy_of, inner_model, merge_adapters, refuse_foreign
from lmcompress.pruning import PruningConfig, prune
from lmcompress.pruning.structured.method import StructuredPruning
from lmcompress.pruning.unstructured import SparsityConfig, prune_weights
from lmcompress.pruning.unstructured.method import Sparsity
from lmcompress.quantization import QuantizationConfig, quantize
from lmcompress.quantization.method import Quantization
from lmcompress.students import by_layers, by_shape, factorize, group, separate, share_layers
from lmcompress.trainers import CompressionTrainer, DistillationTrainer

PRUNING = PruningConfig(target={"sparsity": 0.3}, parts=("heads", "neurons"), criterion="l1")


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's


def with_adapter(family: str = "bert", head: str = "classification"):
    peft = pytest.importorskip("peft")
    model = make(family, head)
    torch.manual_seed(0)
    model.add_adapter(lora(peft, family))
    return model


def lora(peft, family: str, **options):
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["query", "value", "output.dense"]
    return peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2", **options
    )


def with_masks(family: str = "bert"):
    model = make(family)
    torch_prune.l1_unstructured(anatomy_of(model).blocks[0].get("ffn_in"), "weight", 0.5)
    return model


def dynamic(family: str = "bert"):
    return torch.ao.quantization.quantize_dynamic(make(family), {nn.Linear}, dtype=torch.qint8)


def of_torchao(family: str = "bert"):
    """As torchao leaves a model: plain modules whose weights are tensors of a class of its own."""

    class Quantized(torch.Tensor):
        pass

    Quantized.__module__ = "torchao.dtypes.affine_quantized_tensor"
    model = make(family)
    layer = anatomy_of(model).blocks[0].get("query")
    layer._parameters["weight"] = nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    return model


def of_bitsandbytes(family: str = "bert"):
    class Linear8bitLt(nn.Linear):
        pass

    Linear8bitLt.__module__ = "bitsandbytes.nn.modules"
    model = make(family)
    anatomy_of(model).blocks[0].get("query").__class__ = Linear8bitLt
    return model


def stated(family: str = "bert"):
    """Quantized by a library of which only the config tells."""
    model = make(family)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def trained(method: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def run(model, folder):
        rows = [{name: value[0] for name, value in inputs(make("bert"), rows=1).items()} | {"labels": 1}] * 8
        return CompressionTrainer(
            model, args=tiny_arguments(folder, max_steps=2), methods=[method()], train_dataset=rows
        )

    return run


def batches(model):
    return [inputs(make("bert"))]


VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "prune": lambda model, _: prune(model, PRUNING),
    "quantize": lambda model, _: quantize(model, progress=False),
    "prune_weights": lambda model, _: prune_weights(model, SparsityConfig(sparsity=0.5)),
    "share_weights": lambda model, _: share_weights(model, SharingConfig()),
    "keep_heads": lambda model, _: keep_heads(anatomy_of(model).blocks[0], [0, 1, 2, 3]),
    "keep_neurons": lambda model, _: keep_neurons(anatomy_of(model).blocks[0], [0, 1]),
    "keep_layers": lambda model, _: keep_layers(model, [0, 2]),
    "keep_hidden": lambda model, _: keep_hidden(model, range(8)),
    "by_layers": lambda model, _: by_layers(model, 2),
    "by_shape": lambda model, _: by_shape(model, num_heads=2, hidden_size=8),
    "factorize": lambda model, _: factorize(model, rank=2),
    "group": lambda model, _: group(model, 2),
    "separate": lambda model, _: separate(model, [0], 3, batches(model)),
    "share_layers": lambda model, _: share_layers(model),
    "StructuredPruning": trained(lambda: StructuredPruning(PRUNING)),
    "Quantization": trained(lambda: Quantization(QuantizationConfig())),
    "Sparsity": trained(lambda: Sparsity(SparsityConfig(sparsity=0.5))),
    "WeightSharing": trained(lambda: WeightSharing(SharingConfig())),
}
BY_BLOCK = ("keep_heads", "keep_neurons")
MODELS = {
    "adapter": (with_adapter, r"with adapters \(PEFT\), got one at .*merge_and_unload"),
    "masks": (with_masks, r"masks of torch.nn.utils.prune.*prune.remove\(module, 'weight'\)"),
    "dynamic": (dynamic, r"quantized by another library \(torch.ao.nn\).*take the dense model"),
    "torchao": (of_torchao, r"quantized by another library \(torchao\)"),
    "bitsandbytes": (of_bitsandbytes, r"quantized by another library \(bitsandbytes\)"),
    "config": (stated, r"quantized by another library \(gptq\), as its config is"),
}


def snapshot(model) -> dict[str, Any]:
    return {name: id(module) for name, module in model.named_modules()} | {
        name: tensor.clone() for name, tensor in model.named_parameters() if type(tensor) is nn.Parameter
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k] for k in one
    )


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_before_anything_is_changed(tmp_path, verb, kind):
    make_it, message = MODELS[kind]
    if verb in BY_BLOCK and kind == "config":
        pytest.skip("a block has no config")
    model = make_it()
    model.config.use_cache = False  # which a Trainer sets
    before, described = snapshot(model), model.config.to_dict()
    with pytest.raises(LmcompressError, match=message):
        VERBS[verb](model, tmp_path)
    assert same(before, snapshot(model)) and model.config.to_dict() == described
    assert not any(module._forward_hooks for module in model.modules() if kind != "masks")


@pytest.mark.parametrize("verb", ["prune", "quantize", "prune_weights", "share_weights", "by_layers"])
def test_a_peft_model_is_refused_too(tmp_path, verb):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(LmcompressError, match="merge_and_unload"):
        VERBS[verb](model, tmp_path)
    VERBS[verb](model.merge_and_unload(), tmp_path)


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "language")])
def test_merged_adapters_are_weights(family, head):
    model = with_adapter(family, head)
    expected = outputs(model)
    plain = outputs(make(family, head))
    assert not torch.allclose(expected, plain, atol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
    refuse_foreign(model, "prune")
    quantize(model, progress=False)


@pytest.mark.parametrize("kind", ["adapter", "masks", "torchao", "config"])
def test_saving_refuses_too(tmp_path, kind):
    make_it, message = MODELS[kind]
    with pytest.raises(LmcompressError, match=f"cannot save as a compressed checkpoint a model.*{message}"):
        CompressedModel(make_it()).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_masks_that_were_made_permanent_are_weights(tmp_path):
    model = with_masks()
    torch_prune.remove(anatomy_of(model).blocks[0].get("ffn_in"), "weight")
    prune(model, PRUNING)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_and_the_hidden_size_are_refused_before_anything_is_changed(tmp_path, family):
    head = "language" if family == "gpt2" else "base"
    decoder = {} if family == "gpt2" else {"is_decoder": True}
    model = make(family, head, add_cross_attention=True, **decoder)
    before, expected = snapshot(model), outputs(model)
    config = PruningConfig(target={"sparsity": 0.3}, parts=("hidden",), criterion="random")
    for verb in (
        lambda: prune(model, config),
        lambda: keep_hidden(model, range(8)),
        lambda: by_shape(model, hidden_size=8),
        lambda: StructuredPruning(config).attach(model, torch.device("cpu")),
    ):
        with pytest.raises(LmcompressError, match="hidden size.*block 0 has crossattention.*add_cross_attention=False"):
            verb()
    assert same(before, snapshot(model)) and torch.equal(outputs(model), expected)
    keep_heads(anatomy_of(model).blocks[0], [0, 2])
    keep_neurons(anatomy_of(model).blocks[1], range(8))
    assert outputs(model).isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's
def test_models_inside_of_wrappers_are_found():
    model = make("bert")
    assert inner_model(model) is model and inner_model("text") == "text"
    compiled = torch.compile(model)
    assert inner_model(compiled) is model
    peft = pytest.importorskip("peft")
    assert inner_model(torch.compile(peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])))) is model


def test_a_learned_prompt_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(LmcompressError, match="learns a prompt or a prefix.*LoRA"):
        inner_model(peft.get_peft_model(make("gpt2", "language"), config))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_students_and_teachers_with_adapters_are_distilled(tmp_path, family):
    peft = pytest.importorskip("peft")
    head = "language" if family == "gpt2" else "classification"
    matches = (
        Match(loss="hidden_mse", student=2, teacher=3),
        Match(loss="minilmv2_query", student=2, teacher=3, options={"relation_heads": 4}),
    )
    row = {name: value[0] for name, value in inputs(make(family, head), rows=1).items()}
    row["labels"] = row["input_ids"] if family == "gpt2" else torch.tensor(1)
    merged = peft.get_peft_model(make(family, head, seed=1), lora(peft, family))
    losses = []
    for teacher in (merged, merged.merge_and_unload()):
        student = make(family, head)
        trainer = DistillationTrainer(
            student,
            args=tiny_arguments(tmp_path, max_steps=1),
            teacher=teacher,
            distillation=DistillationConfig(matches=matches),
            train_dataset=[row] * 8,
        )
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer.train()
        losses.append([v for k, v in trainer.state.log_history[0].items() if k.startswith("loss_")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_module_that_only_looks_like_an_adapter_is_none():
    model = make("bert")
    model.base_layer = types.SimpleNamespace()
    refuse_foreign(model, "prune")
