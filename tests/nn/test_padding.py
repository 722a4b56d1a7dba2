"""What stands where there is no token changes no answer, and each thread knows its own padding."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from families import inputs, make, outputs, set_dropout
from torch import nn

from lmcompress.checkpoint.encoding import unpacked
from lmcompress.nn.fusion import release_passes
from lmcompress.nn.padding import follow_padding, release_padding
from lmcompress.numerics import padding
from lmcompress.quantization import ActivationScheme, FakeQuantized, QuantizationConfig, WeightScheme, plan, quantize

EIGHT = WeightScheme(quantizer="minmax", granularity="row")
SCHEMES = {
    "symmetric": ActivationScheme(symmetric=True),
    "asymmetric": ActivationScheme(symmetric=False),
    "4 bits": ActivationScheme(bits=4),
    "4 bits, asymmetric": ActivationScheme(bits=4, symmetric=False),
    "clipped": ActivationScheme(clip=1.5),
    "by token": ActivationScheme(granularity="token"),
}


def config(scheme, attention=False):
    return QuantizationConfig(weights=EIGHT, embeddings=EIGHT, activations=scheme, attention=attention)


FILLER = 9


def widened(model):
    """The token that pads has by far the widest range, which norms as weak as these leave it."""
    with torch.no_grad():
        model.get_input_embeddings().weight[FILLER] *= 30
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 100.0
                module.weight *= 10
    return model


def assert_same(got, wanted, most=0.02):
    """Up to sums in another order, after which one number may get the next code: less than padding would change."""
    error = float((got - wanted).norm() / wanted.norm())
    assert got.shape == wanted.shape and error < most, error


def packed(name, head, scheme, attention=False):
    model = widened(make(name, head))
    quantize(model, config(scheme, attention), progress=False)
    return model.eval()


def texts(rows=2, length=7, seed=1):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, count):
    more = torch.full((len(ids), count), FILLER)
    return torch.cat([ids, more], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(more)], 1)


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@torch.no_grad()
def test_padding_changes_no_answer(name, scheme, attention):
    # of 4 bits, the other text has a number on the edge of a code, which sums in another order put beyond it
    model, ids = packed(name, "language", scheme, attention), texts(seed=1 if scheme.bits == 8 else 2)
    wanted = model(input_ids=ids).logits
    for count in (1, 20):
        longer, mask = padded(ids, count)
        for given in ((longer, None, mask) if name == "gpt2" else (longer, mask),), {"input_ids": longer}:
            got = model(*given[0]) if isinstance(given, tuple) else model(**given, attention_mask=mask)
            assert_same(got.logits[:, : ids.shape[1]], wanted, 0.02 if scheme.bits == 8 else 0.2)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@torch.no_grad()
def test_without_a_mask_padding_counts(name):
    model, ids = packed(name, "language", SCHEMES["symmetric"]), texts()
    longer, _ = padded(ids, 20)
    everything = torch.ones_like(longer)
    assert torch.equal(model(longer).logits, model(longer, attention_mask=everything).logits)
    longer, mask = padded(ids, 20)
    wanted = model(longer, attention_mask=mask).logits
    release_padding(model)
    left = (model(longer, attention_mask=mask).logits - wanted)[:, : ids.shape[1]]
    assert float(left.norm() / wanted[:, : ids.shape[1]].norm()) > 0.03, name
    follow_padding(model)
    # a mask without a token says nothing about ranges
    assert torch.isfinite(model(longer, attention_mask=0 * everything).logits).all()


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@torch.no_grad()
def test_by_token_an_answer_alone_is_the_answer_in_a_batch(name, attention):
    model, batch = packed(name, "language", SCHEMES["by token"], attention), texts(rows=6)
    together = model(batch).logits
    for row in range(6):
        alone = model(batch[row : row + 1]).logits[0]
        assert_same(alone, together[row])
    by_tensor = packed(name, "language", SCHEMES["symmetric"], attention)
    assert not torch.allclose(by_tensor(batch[:1]).logits[0], by_tensor(batch).logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
def test_by_token_generation_is_the_same_without_a_cache_alone_and_beside_a_longer_text(attention):
    model = packed("gpt2", "language", SCHEMES["by token"], attention)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
    ids, other = texts(rows=1, length=5), texts(rows=2, length=9)[1:]
    together = torch.cat([torch.cat([torch.full((1, 4), 1), ids], 1), other])
    mask = torch.ones_like(together)
    mask[0, :4] = 0
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 5:]
    without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)[0, 5:]
    beside = model.generate(together, attention_mask=mask, **options)[0, 9:]
    assert wanted.tolist() == without.tolist() == beside.tolist()


@torch.no_grad()
def test_left_padding_and_a_cache_change_no_answer():
    model = packed("gpt2", "language", SCHEMES["symmetric"], attention=True)
    ids = texts(rows=1, length=5)
    longer, mask = torch.cat([torch.full((1, 3), FILLER), ids], 1), torch.tensor([[0] * 3 + [1] * 5])
    positions = torch.tensor([[0] * 3 + list(range(5))])
    first = model(ids, use_cache=True)
    padded_first = model(longer, attention_mask=mask, position_ids=positions, use_cache=True)
    assert_same(padded_first.logits[:, 3:], first.logits)
    one = torch.tensor([[7]])
    wanted = model(one, past_key_values=first.past_key_values).logits
    mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
    past = padded_first.past_key_values
    got = model(one, attention_mask=mask, position_ids=torch.tensor([[5]]), past_key_values=past).logits
    assert_same(got, wanted)


def test_every_thread_has_its_own_padding():
    model, ids = packed("bert", "language", SCHEMES["symmetric"]), texts()
    cases = [padded(ids, count) for count in (1, 5, 12, 20)]
    with torch.no_grad():
        wanted = [model(longer, attention_mask=mask).logits for longer, mask in cases]
    wrong = []

    def serve(case, expected):
        for _ in range(20):
            with torch.no_grad():
                got = model(case[0], attention_mask=case[1]).logits
            if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
                wrong.append(case)

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and padding.current() is None


def test_nothing_stays_after_an_error():
    model = packed("bert", "language", SCHEMES["symmetric"])

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(*padded(texts(), 2))
    handle.remove()
    assert padding.current() is None
    padding.end()
    assert padding.current() is None


@torch.no_grad()
def test_copies_know_padding_and_dense_models_need_not():
    model = packed("bert", "language", SCHEMES["symmetric"])
    longer, mask = padded(texts(), 9)
    wanted = model(longer, attention_mask=mask).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(longer, attention_mask=mask).logits, wanted)
    dense = unpacked(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (dense, dense.base_model))
    follow_padding(model)
    assert len(model._forward_pre_hooks) == 1
    release_padding(model)
    release_padding(model)
    release_passes(model.base_model)
    assert not model._forward_pre_hooks and not model.bert._forward_hooks


def test_masks_fit_only_what_has_their_tokens():
    mask, keys = torch.tensor([[True, False]]), torch.tensor([[True, True, False]])
    padding.begin(padding.Tokens(mask, keys))
    try:
        assert padding.real(torch.ones(1, 2, 5)).shape == (1, 2, 1)
        assert padding.real(torch.ones(1, 4, 2, 5)).shape == (1, 1, 2, 1)
        assert padding.real(torch.ones(1, 4, 3, 5)).shape == (1, 1, 3, 1)
        for shape in ((1, 3, 5), (2, 2, 5), (1, 5), (2,), (1, 2, 4, 5)):
            assert padding.real(torch.ones(shape)) is None
        assert padding.without_padding(torch.ones(1, 2, 1)).tolist() == [[[1.0], [0.0]]]
    finally:
        padding.end()
    assert padding.real(torch.ones(1, 2, 5)) is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_blocks_know_padding_in_the_backward_pass(reentrant):
    results = []
    for checkpointed in (False, True):
        model = widened(make("bert", "classification")).train()
        set_dropout(model, 0.0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        FakeQuantized(model, plan(model, config(ActivationScheme(bits=4), attention=True)))
        # two passes before their backward passes
        losses = [model(*padded(texts(), count)).logits.square().sum() for count in (3, 6)]
        sum(losses).backward()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_knows_padding():
    torch._dynamo.reset()
    model = packed("bert", "language", SCHEMES["symmetric"])
    compiled, ids = torch.compile(model, backend="eager"), texts()
    for count in (0, 3, 8):
        longer, mask = padded(ids, count)
        assert_same(compiled(longer, attention_mask=mask).logits[:, : ids.shape[1]], model(ids).logits)
    torch._dynamo.reset()


@torch.no_grad()
def test_models_that_arrange_the_batch_anew_know_padding():
    from transformers import BertConfig, BertForMultipleChoice

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    model = BertForMultipleChoice(BertConfig(**sizes)).eval()
    quantize(model, config(SCHEMES["symmetric"]), progress=False)
    ids = texts(rows=4).reshape(2, 2, 7)
    longer, mask = padded(ids.reshape(4, 7), 5)
    got = model(longer.reshape(2, 2, 12), attention_mask=mask.reshape(2, 2, 12)).logits
    assert_same(got, model(ids).logits)


def test_training_and_packed_model_leave_out_the_same():
    for name, head in itertools.product(("bert", "gpt2"), ("language",)):
        model = make(name, head)
        fake = FakeQuantized(model, plan(model, config(ActivationScheme(), attention=True)))
        trained = outputs(model)
        batch = inputs(model)
        other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], FILLER)
        with torch.no_grad():
            again = model(**{**batch, "input_ids": other}).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(again[real], trained[real] if trained.dim() == 3 else again[real])
        fake.finish()
        with torch.no_grad():
            served = model(**batch).logits[real]
        assert float((served - again[real]).abs().mean() / again[real].abs().mean()) < 2e-2
        assert isinstance(model, nn.Module)


@torch.no_grad()
def test_an_interrupted_pass_leaves_nothing_once_the_model_runs_again():
    model, ids = packed("bert", "language", SCHEMES["symmetric"]), texts()
    longer, mask = padded(ids, 3)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_pre_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(longer, attention_mask=mask)
    handle.remove()
    assert padding.current() is not None
    with padding.stated(mask.bool()):
        model(longer, attention_mask=mask)
    assert padding.current() is None
