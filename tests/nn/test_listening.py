"""What is heard of attention is what the model computes, its positions, norms, bounds, windows and groups included."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lmcompress import LmcompressError
from lmcompress.checkpoint.schema import ActivationEncoding, AttentionEncoding
from lmcompress.nn.listening import Heard, listen
from lmcompress.nn.quantized_attention import ATTENTION, quantize_attention

SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
HEAD = dict(head_dim=8)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
GPT2 = dict(n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=64, initializer_range=0.3)
DISTILBERT = dict(dim=32, n_heads=4, n_layers=2, hidden_dim=40, vocab_size=64, initializer_range=0.3)
MODERNBERT = SIZES | dict(local_attention=8, layer_types=["sliding_attention", "full_attention"], cls_token_id=None,
    sep_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=64, initializer_factor=2.0)
GPT_OSS = GROUPED | HEAD | SLIDING | dict(num_local_experts=2, num_experts_per_tok=1)

MODELS = {
    "Bert": (SIZES, "encoder.layer.{}.attention.self"),
    "Roberta": (SIZES, "encoder.layer.{}.attention.self"),
    "Electra": (SIZES, "encoder.layer.{}.attention.self"),
    "DistilBert": (DISTILBERT, "transformer.layer.{}.attention"),
    "GPT2": (GPT2, "h.{}.attn"),
    "Llama": (GROUPED, "layers.{}.self_attn"),
    "Qwen3": (GROUPED | HEAD, "layers.{}.self_attn"),
    "Gemma2": (GROUPED | HEAD | SLIDING | dict(attn_logit_softcapping=2.0), "layers.{}.self_attn"),
    "Mistral": (GROUPED | dict(sliding_window=5), "layers.{}.self_attn"),
    "ModernBert": (MODERNBERT, "layers.{}.attn"),
    "T5Encoder": (T5, "encoder.block.{}.layer.0.SelfAttention"),
    "GptOss": (GPT_OSS, "layers.{}.self_attn"),
}
"""By prefix of the class: arguments of the config, path of the attention module of a block."""
OUTPUTS = ("attention.output.dense", "out_lin", "attn.c_proj", "o_proj", "attn.Wo", "SelfAttention.o")
"""Ends of the paths of the projections that read the heads' output."""
NO_SDPA = ("Gemma2", "GptOss")
"""Models that compute under eager attention only, for bounded scores or keys without value."""


def make(name: str, attention: str = "eager") -> PreTrainedModel:
    """A tiny random model with random biases and norms, in evaluation mode."""
    torch.manual_seed(0)
    arguments, _ = MODELS[name]
    config = getattr(transformers, name.removesuffix("Encoder") + "Config")(**arguments, attn_implementation=attention)
    model = getattr(transformers, name + "Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of its two blocks."""
    name = type(model).__name__.removesuffix("Model")
    return [model.get_submodule(MODELS[name][1].format(number)) for number in range(2)]


def batch(rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Random tokens, the last row padded on the right."""
    ids = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def heard(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Heard]:
    """What is heard of its attention modules in one forward pass."""
    calls: list[Heard] = []
    listeners = [listen(module, calls.append) for module in attentions(model)]
    model(**inputs)
    for listener in listeners:
        listener.remove()
    return calls


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", ATTENTION])
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_of_the_eager_model(name, attention, padded):
    if name in NO_SDPA and attention != "eager":
        pytest.skip(f"{name} computes under eager attention only")
    inputs = batch()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    real = inputs["attention_mask"].bool()
    eager = make(name)
    model = make(name, attention)
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
        found = heard(model, inputs)
    for one, right in zip(found, expected, strict=True):
        probabilities = one.probabilities()
        assert probabilities.shape == right.shape and probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.transpose(1, 2)[real], right.transpose(1, 2)[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_times_values_are_what_the_heads_give(name):
    model, inputs = make(name), batch()
    given = {}
    out = next(module for path, module in model.named_modules() if path.endswith(OUTPUTS) and ".1." in path)
    out.register_forward_pre_hook(lambda _, args: given.update(x=args[0]))
    with torch.no_grad():
        one = heard(model, inputs)[1]
    values = one.value.repeat_interleave(one.query.shape[1] // one.value.shape[1], dim=1)
    context = (one.probabilities() @ values).transpose(1, 2).flatten(2)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(context[real], given["x"][real], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_through_eager_attentions():
    for name in MODELS:
        inputs, gradients = batch(), []
        real = inputs["attention_mask"].bool()
        for captured in (True, False):
            model = make(name)
            if captured:
                probabilities = heard(model, inputs)[1].probabilities()
            else:
                probabilities = model(**inputs, output_attentions=True).attentions[1]
            torch.manual_seed(1)
            (torch.randn_like(probabilities) * probabilities).transpose(1, 2)[real].sum().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and gradients[0]
        for path, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][path], rtol=1e-3, atol=1e-5, msg=f"{name} {path}")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_gradients_under_checkpointing_are_those_without(name):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = make(name, "sdpa").train(), batch()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        one = heard(model, inputs)[0]
        (one.probabilities().square().sum() + one.value.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_query_that_sees_no_key_has_zeros_and_a_finite_gradient():
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])[None, None]
    for given in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        found = Heard(query, query, query, 0.5, given).probabilities()
        assert found[0, :, 0].eq(0).all() and found[0, :, 1:].sum(-1).allclose(torch.ones(2, 2))
        (gradient,) = torch.autograd.grad(found.square().sum(), query)
        assert gradient.isfinite().all() and gradient.any()


def stock() -> bool:
    """Whether nothing of listening is left in Transformers."""
    return AttentionInterface.get_interface.__module__ == "transformers.modeling_utils"


def test_nothing_is_left_when_nobody_listens():
    model, other, inputs = make("Bert", "sdpa"), make("Llama", "sdpa"), batch()
    before, calls = other(**inputs)[0], []
    assert stock()
    listeners = [listen(module, calls.append) for module in attentions(model)]
    assert torch.equal(other(**inputs)[0], before) and calls == [] and not stock()
    listeners[0].remove()
    model(**inputs)
    assert len(calls) == 1 and not stock()
    listeners[0].remove()
    listeners[1].remove()
    model(**inputs)
    assert len(calls) == 1 and stock()
    assert not any("attention_listeners" in module.__dict__ for module in model.modules())


def test_the_outputs_are_those_of_a_model_that_nobody_hears():
    for name in MODELS:
        model, inputs = make(name), batch()
        before = model(**inputs)[0]
        listener = listen(attentions(model)[0], lambda _: None)
        assert torch.equal(model(**inputs)[0], before)
        listener.remove()


def test_several_listen_to_one_module_each_with_its_own_end():
    model, inputs, calls = make("Bert", "sdpa"), batch(), []
    module = attentions(model)[0]
    first, second = listen(module, calls.append), listen(module, calls.append)
    model(**inputs)
    first.remove()
    model(**inputs)
    second.remove()
    assert len(calls) == 3 and stock()


def test_a_failed_forward_pass_leaves_nothing_but_the_listener():
    model, inputs = make("Bert", "sdpa"), batch()

    def fail(_: Heard) -> None:
        raise RuntimeError("the listener failed")

    listener = listen(attentions(model)[0], fail)
    with pytest.raises(RuntimeError, match="the listener failed"):
        model(**inputs)
    listener.remove()
    model(**inputs)
    assert stock()


def test_copies_and_files_hold_no_listeners():
    model, inputs, calls = make("Bert", "sdpa"), batch(), []
    listener = listen(attentions(model)[0], calls.append)
    copy.deepcopy(model)(**inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False)(**inputs)
    assert calls == [] and not any("listeners" in name for name in model.state_dict())
    listener.remove()


def test_a_model_that_is_dropped_takes_its_listeners_along():
    model = make("Bert", "sdpa")
    gone = weakref.ref(model)
    calls: list[Heard] = []

    def take(one: Heard, model: PreTrainedModel = model) -> None:
        calls.append(one)

    # the handle is dropped: the module itself keeps what listens to it, which knows the model
    listen(attentions(model)[0], take)
    model(**batch())
    assert len(calls) == 1
    calls.clear()
    del model, take
    gc.collect()
    assert gone() is None
    # the next to leave finds that nobody listens
    listen(attentions(make("GPT2"))[0], calls.append).remove()
    assert stock()


def test_each_thread_hears_its_own_model():
    models, inputs, failures = [make("Bert", "sdpa"), make("Llama", "sdpa")], batch(), []
    expected = [[one.probabilities() for one in heard(model, inputs)] for model in models]

    def run(model: PreTrainedModel, right: list[Tensor]) -> None:
        for _ in range(10):
            found = [one.probabilities() for one in heard(model, inputs)]
            if len(found) != 2 or not all(map(torch.equal, found, right)):
                failures.append(type(model).__name__)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and stock()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("listening", [True, False])
def test_a_compiled_model_is_heard_and_computes_the_same(listening):
    torch.compiler.reset()
    model, inputs, calls = make("Llama", "sdpa"), batch(), []
    expected = model(**inputs)[0], [one.probabilities() for one in heard(model, inputs)]
    listeners = [listen(module, calls.append) for module in attentions(model)] if listening else []
    compiled = torch.compile(model, backend="eager", fullgraph=not listening)
    torch.testing.assert_close(compiled(**inputs)[0], expected[0])
    assert len(calls) == len(listeners)
    for one, right in zip(calls, expected[1], strict=False):
        torch.testing.assert_close(one.probabilities(), right)
    for listener in listeners:
        listener.remove()
    torch.testing.assert_close(compiled(**inputs)[0], expected[0])


# Transformers 5.17 compiles parts of DeBERTa when it is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_attention_outside_of_the_attention_functions_is_refused():
    config = transformers.DebertaV2Config(**SIZES | dict(hidden_size=32))
    model = transformers.DebertaV2Model(config)
    with pytest.raises(LmcompressError, match="DisentangledSelfAttention computes attention by itself.*hidden states"):
        listen(model.encoder.layer[0].attention.self, lambda _: None)
    assert stock()


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_kernels_whose_masks_cannot_be_read_are_refused(kernel):
    model = make("Bert", "sdpa")
    listener = listen(attentions(model)[0], lambda _: None)
    model.config._attn_implementation = kernel
    with pytest.raises(LmcompressError, match=f"masks of attn_implementation '{kernel}' cannot be read.*\"sdpa\""):
        listen(attentions(model)[0], lambda _: None)
    with pytest.raises(LmcompressError, match="cannot be read"):
        attentions(model)[0](torch.randn(2, 5, 32))
    listener.remove()


def test_a_mask_of_another_kind_is_refused():
    module = attentions(make("Bert", "sdpa"))[0]
    listener = listen(module, lambda _: None)
    with pytest.raises(LmcompressError, match=r"heard with a mask \(batch.*got a Tensor of shape \(2, 5\)"):
        module(torch.randn(2, 5, 32), torch.ones(2, 5))
    listener.remove()


def test_quantized_attention_is_heard_as_it_computes():
    eight = ActivationEncoding(bits=8)
    for name in ("Bert", "Llama"):
        model, inputs = make(name, "sdpa"), batch()
        quantize_attention(model, attentions(model), AttentionEncoding(queries=eight, keys=eight, values=eight))
        given, module = {}, attentions(model)[0]
        out = next(m for path, m in model.named_modules() if path.endswith(OUTPUTS) and ".0." in path)
        out.register_forward_pre_hook(lambda _, args, given=given: given.update(x=args[0]))
        calls: list[Heard] = []
        listener = listen(module, calls.append)
        with torch.no_grad():
            model(**inputs)
        listener.remove()
        (one,) = calls
        # codes of 8 bits: no more than 255 values
        assert all(len(operand.unique()) <= 255 for operand in (one.query, one.key, one.value))
        values = one.value.repeat_interleave(one.query.shape[1] // one.value.shape[1], dim=1)
        context = (one.probabilities() @ values).transpose(1, 2).flatten(2)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(context[real], given["x"][real], rtol=1e-4, atol=1e-5)
