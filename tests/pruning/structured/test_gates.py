"""gates: ones change nothing to the bit, zeros are masks, gradients are those of each example alone."""

import copy

import pytest
import torch
from families import FAMILIES, FFN, HEAD_SIZE, HEADS, HIDDEN, LAYERS, inputs, make, outputs
from torch import nn
from transformers import BertForMultipleChoice

from lmcompress.checkpoint.cutting import drop_heads, drop_neurons
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of
from lmcompress.pruning import PARTS, Gates, Units, full
from lmcompress.pruning.structured.gates import gated_hidden, reading_hidden


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    return request.param


def test_ones_change_nothing_to_the_bit(family):
    for head in ("classification", "language"):
        model = make(family, head)
        before = outputs(model)
        with Gates(model, PARTS) as gates:
            assert torch.equal(outputs(model), before)
            gates.set(full(model, PARTS))
            assert torch.equal(outputs(model), before)
            gates.set(full(model, PARTS, 1.0, torch.float32))
            assert torch.equal(outputs(model), before)
            gates.ones_per_example(3)
            assert torch.equal(outputs(model), before)
            gates.set(full(model, PARTS, 0.5, torch.float32))
            assert not torch.allclose(outputs(model), before)
        assert torch.equal(outputs(model), before)


def test_nothing_is_left_after_they_are_removed(family):
    model = make(family)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    gates = Gates(model, PARTS)
    gates.remove()
    gates.remove()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def _by_hand(model, mask):
    """An independent masked model: weights set to zero, norms and blocks replaced."""
    model = copy.deepcopy(model)
    for index, block in enumerate(anatomy_of(model).blocks):
        out, ffn = block.get("attention_out"), block.get("ffn_out")
        transposed = model.config.model_type == "gpt2"
        with torch.no_grad():
            for module, columns in (
                (out, mask.heads[index].repeat_interleave(HEAD_SIZE)),
                (ffn, mask.neurons[index]),
            ):
                module.weight[~columns if transposed else (slice(None), ~columns)] = 0
            for module, stays in ((out, mask.attention[index]), (ffn, mask.ffn[index])):
                if not stays:
                    module.weight.zero_()
                    module.bias.zero_()
        if not mask.layers[index]:
            block.module.forward = lambda x, *args, **kwargs: x
    return model


def test_zeros_are_weights_of_zero(family):
    model = make(family, "language")
    generator = torch.Generator().manual_seed(0)
    parts = [part for part in PARTS if part != "hidden"]
    mask = full(model, parts).map(lambda ones: torch.rand(ones.shape, generator=generator) < 0.6)
    mask.layers[1] = False
    expected = outputs(_by_hand(model, mask))
    with Gates(model, parts) as gates:
        gates.set(mask)
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_what_is_masked_of_the_stream_is_read_by_nobody(family):
    model = make(family, "language")
    mask = full(model, ["hidden"])
    mask.hidden[::3] = False
    with Gates(model, ["hidden"]) as gates:
        gates.set(mask)
        before = outputs(model)
        with torch.no_grad():
            for block in anatomy_of(model).blocks:
                for part in ("attention_out", "ffn_out"):
                    block.get(part).bias[::3] += 100.0
        torch.testing.assert_close(outputs(model), before, rtol=1e-6, atol=1e-6)


def test_a_norm_averages_over_what_is_left():
    model = make("bert")
    norm = model.bert.embeddings.LayerNorm
    keep = torch.arange(HIDDEN) % 3 != 0
    x = torch.randn(2, 5, HIDDEN)
    small = nn.LayerNorm(int(keep.sum()), eps=norm.eps)
    small.load_state_dict({"weight": norm.weight[keep], "bias": norm.bias[keep]})
    for hidden in (keep, keep.float() * 0.7, keep.expand(2, -1)):
        with Gates(model, ["hidden"]) as gates, torch.no_grad():
            gates.set(Units(hidden=hidden))
            got, value = norm(x), float(hidden.float().max())
            torch.testing.assert_close(got[..., keep], small(x[..., keep]) * value, rtol=1e-5, atol=1e-6)
            assert not got[..., ~keep].any()


WRITES_OUTSIDE = {
    ("bert", "base"): 2,  # norm of the embeddings, pooler
    ("bert", "classification"): 2,
    ("bert", "language"): 3,  # norm of the embeddings, transform with its norm
    ("roberta", "base"): 2,
    ("roberta", "classification"): 2,  # norm of the embeddings, head
    ("roberta", "language"): 3,
    ("distilbert", "base"): 1,
    ("distilbert", "classification"): 2,
    ("distilbert", "language"): 3,
    ("electra", "base"): 1,
    ("electra", "classification"): 2,
    ("electra", "language"): 3,
    ("electra-projected", "base"): 1,  # the projection of the embeddings
    ("electra-projected", "classification"): 2,
    ("electra-projected", "language"): 1,  # the generator's transform is as wide as the embeddings
    ("gpt2", "base"): 3,  # words, positions, the last norm
    ("gpt2", "classification"): 3,
    ("gpt2", "language"): 3,
}
READS_OUTSIDE = {
    ("bert", "base"): 1,  # pooler
    ("bert", "classification"): 2,  # pooler, classifier
    ("bert", "language"): 2,  # transform, decoder
    ("roberta", "base"): 1,
    ("roberta", "classification"): 2,
    ("roberta", "language"): 2,
    ("distilbert", "base"): 0,
    ("distilbert", "classification"): 2,
    ("distilbert", "language"): 2,
    ("electra", "base"): 0,
    ("electra", "classification"): 2,
    ("electra", "language"): 2,
    ("electra-projected", "base"): 0,
    ("electra-projected", "classification"): 2,
    ("electra-projected", "language"): 1,  # the generator's transform alone
    ("gpt2", "base"): 0,
    ("gpt2", "classification"): 1,
    ("gpt2", "language"): 1,
}


def test_hidden_gates_are_on_every_write_and_every_read_once(family):
    for head in ("base", "classification", "language"):
        model = make(family, head)
        assert len(gated_hidden(model)) == 4 * LAYERS + WRITES_OUTSIDE[family.name, head]
        # query, key and value (one matrix in GPT-2), and the first of the feed-forward network
        in_block = 2 if family.name == "gpt2" else 4
        assert len(reading_hidden(model)) == in_block * LAYERS + READS_OUTSIDE[family.name, head]


def test_what_is_read_of_a_dimension_can_be_turned_off_alone(family):
    model = make(family, "language")
    values = torch.ones(HIDDEN)
    values[::3] = 0
    before = outputs(model)
    with Gates(model, ["hidden"]) as gates:
        gates.read_with(values)
        off = outputs(model)
        gates.set(full(model, ["hidden"]))
        assert torch.equal(outputs(model), before)
    silent = copy.deepcopy(model)
    tied = {id(module.weight) for module in silent.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for module in reading_hidden(silent):
            if id(module.weight) in tied:
                module.weight = nn.Parameter(module.weight.clone())
            module.weight[
                (slice(None), slice(None, None, 3)) if isinstance(module, nn.Linear) else slice(None, None, 3)
            ] = 0
    assert not torch.allclose(off, before)
    torch.testing.assert_close(off, outputs(silent), rtol=1e-5, atol=1e-5)


def test_gradients_for_scores_of_the_stream_are_of_single_reads(family):
    model = make(family)
    batch, width = inputs(model), HIDDEN
    expected = torch.zeros(3, width)
    for row in range(3):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).logits.square().sum().backward()
        for module in reading_hidden(model):
            product = (module.weight * module.weight.grad).detach()
            expected[row] += product.sum(0 if isinstance(module, nn.Linear) else 1)
    with Gates(model, PARTS) as gates:
        for leaves in (gates.ones_per_example(3), full(model, PARTS, 1.0, torch.float32)):
            leaves = leaves.map(lambda leaf: leaf.detach().expand(3, -1).clone().requires_grad_())
            gates.set_for_scores(leaves)
            model(**batch).logits.square().sum().backward()
            torch.testing.assert_close(leaves.hidden.grad, expected, rtol=1e-3, atol=1e-4)


def test_a_closed_dimension_stays_closed_where_scores_are_taken():
    model = make("bert")
    mask = torch.ones(HIDDEN)
    mask[:5] = 0
    with Gates(model, ["hidden"]) as gates:
        gates.set(Units(hidden=mask))
        closed = outputs(model)
        leaf = mask.expand(3, -1).clone().requires_grad_()
        gates.set_for_scores(Units(hidden=leaf))
        answer = model(**inputs(model)).logits
        answer.sum().backward()
        assert not leaf.grad[:, :5].any() and leaf.grad[:, 5:].any()
        torch.testing.assert_close(outputs(model), closed)
        gates.set(Units(hidden=mask))
        assert torch.equal(outputs(model), closed)


def test_reads_need_gates_of_the_stream():
    with Gates(make("bert"), ["heads"]) as gates:
        with pytest.raises(LmcompressError, match="gates of hidden, got gates of heads"):
            gates.read_with(torch.ones(HIDDEN))


@pytest.mark.parametrize("part", PARTS)
def test_gradients_per_example_are_those_of_each_alone(family, part):
    model = make(family)
    batch = inputs(model)

    def gradient(rows):
        with Gates(model, [part]) as gates:
            leaves = gates.ones_per_example(len(rows))
            given = {name: value[rows] for name, value in batch.items()}
            model(**given).logits.square().sum().backward()
            return [tensor.grad for _, _, tensor in leaves.items()]

    together = gradient([0, 1, 2])
    for row in range(3):
        for whole, alone in zip(together, gradient([row]), strict=True):
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-3, atol=1e-4)
    assert any(tensor.abs().sum() > 0 for tensor in together)


def test_a_gradient_is_the_slope_of_the_loss(family):
    model = make(family).double()
    values = full(model, PARTS, 0.9, torch.float64).map(lambda x: x.requires_grad_())
    batch = inputs(model)

    def loss():
        return model(**batch).logits.square().sum()

    with Gates(model, PARTS) as gates:
        gates.set(values)
        loss().backward()
        for _, _, tensor in values.items():
            with torch.no_grad():
                step = 1e-6
                tensor[0] += step
                above = loss()
                tensor[0] -= 2 * step
                below = loss()
                tensor[0] += step
            torch.testing.assert_close(tensor.grad[0], (above - below) / (2 * step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_takes_gates(family, attention):
    model = make(family, attn_implementation=attention)
    reference = make(family, attn_implementation="eager")
    answers = []
    for m in (model, reference):
        with Gates(m, ["heads"]) as gates:
            gates.set(Units(heads=tuple(torch.linspace(0, 1, HEADS) for _ in range(LAYERS))))
            answers.append(outputs(m))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_a_part_that_is_not_set_again_keeps_its_values():
    model = make("bert")
    with Gates(model, ["heads", "ffn"]) as gates:
        gates.set(Units(ffn=torch.tensor([0.0, 1.0, 1.0])))
        gates.set(Units(heads=full(model, ["heads"]).heads))
        assert gates.values().ffn.tolist() == [0.0, 1.0, 1.0]
        assert gates.values().heads[0].dtype == torch.bool


def test_mixed_precision_keeps_its_dtype(family):
    model = make(family).to(torch.bfloat16)
    with Gates(model, PARTS) as gates:
        gates.set(full(model, PARTS, 0.5, torch.float32))
        assert outputs(model).dtype == torch.bfloat16
        gates.set(Units(hidden=torch.arange(HIDDEN) > 2))
        assert outputs(model).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_under_gradient_checkpointing_the_gradients_are_the_same(family):
    gradients = []
    for checkpointing in (False, True):
        model = make(family)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Gates(model, PARTS) as gates:
            leaves = gates.ones_per_example(3)
            answer = model(**inputs(model), **({"use_cache": False} if family.name == "gpt2" else {}))
            answer.logits.square().sum().backward()
            gradients.append([tensor.grad for _, _, tensor in leaves.items()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_rows_of_multiple_choice_get_their_examples_value():
    config = make("bert").config
    torch.manual_seed(0)
    model = BertForMultipleChoice(config).eval()
    ids = torch.randint(2, 60, (2, 3, 7))
    with Gates(model, ["heads", "hidden", "layers"]) as gates, torch.no_grad():
        values = full(model, ["heads", "hidden", "layers"], 1.0, torch.float32).map(
            lambda x: torch.stack([torch.zeros_like(x) + 0.3, torch.ones_like(x)])
        )
        gates.set(values)
        both = model(input_ids=ids).logits
        gates.set(values.map(lambda x: x[0]))
        first = model(input_ids=ids).logits
        gates.set(values.map(lambda x: x[1]))
        second = model(input_ids=ids).logits
    torch.testing.assert_close(both, torch.stack([first[0], second[1]]), rtol=1e-5, atol=1e-6)


def test_a_block_without_heads_or_neurons_takes_gates(family):
    model = make(family)
    drop_heads(anatomy_of(model).blocks[0])
    drop_neurons(anatomy_of(model).blocks[2])
    before = outputs(model)
    with Gates(model, PARTS) as gates:
        assert gates.values().heads[0].shape == (0,) and gates.values().neurons[2].shape == (0,)
        leaves = gates.ones_per_example(3)
        assert torch.equal(outputs(model), before)
        model(**inputs(model)).logits.sum().backward()
        assert leaves.attention.grad[:, 0].abs().sum() > 0
        gates.set(Units(attention=torch.tensor([False, True, True])))
        assert not torch.allclose(outputs(model), before)


def test_values_for_another_batch_are_refused():
    model = make("bert")
    with Gates(model, ["heads"]) as gates:
        gates.ones_per_example(2)
        with pytest.raises(LmcompressError, match="values for 2 examples, the model was given 3 rows"):
            outputs(model)


def test_values_of_a_part_without_gates_are_refused():
    model = make("bert")
    with Gates(model, ["heads"]) as gates:
        with pytest.raises(LmcompressError, match="parts that the gates are of, heads, got ffn"):
            gates.set(Units(ffn=torch.ones(LAYERS)))


@pytest.mark.parametrize("shape", [(FFN + 1,), (), (2, 3, FFN)], ids=str)
def test_values_of_another_shape_are_refused(shape):
    model = make("bert")
    with Gates(model, ["neurons"]) as gates:
        with pytest.raises(LmcompressError, match="values of neurons must have the model's shapes"):
            gates.set(Units(neurons=(torch.ones(FFN), torch.ones(shape), torch.ones(FFN))))


def test_no_parts_and_unknown_parts_are_refused():
    with pytest.raises(LmcompressError, match="gates must be of at least one part, got none"):
        Gates(make("bert"), [])
    with pytest.raises(LmcompressError, match="unknown part 'head'; did you mean 'heads'"):
        Gates(make("bert"), ["head"])
