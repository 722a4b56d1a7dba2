"""Scores: independent computations of what they are, and what they must not depend on."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from families import FAMILIES, FFN, HEADS, HIDDEN, LABELS, LAYERS, LLAMA, VOCAB, cut_unevenly, inputs, make

from lmcompress.activations.capture import extract
from lmcompress.errors import LmcompressError
from lmcompress.families import anatomy_of, is_conv1d, weight_view
from lmcompress.pruning.structured import criteria
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.registry import CRITERIA
from lmcompress.pruning.structured.scoring import check_scores, normalized, score
from lmcompress.pruning.structured.units import PARTS, Units, full

ROWS, LENGTH = 4, 9
# of four examples, a histogram of a hundred bins says of every unit that all of them differ
NAMED = {
    **CRITERIA,
    "activation_entropy": replace(
        CRITERIA["activation_entropy"], function=partial(criteria.activation_entropy, bins=3)
    ),
}

WITH_DATA = [name for name, criterion in CRITERIA.items() if criterion.needs not in ("nothing", "weights")]
BY_GRADIENT = [name for name, criterion in CRITERIA.items() if criterion.needs in ("gates", "products")]


def batch_for(model, rows=ROWS, length=LENGTH, seed=0):
    """Rows of different lengths, with labels that fit the head."""
    batch = inputs(model, rows=rows, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for row in range(rows):
        batch["attention_mask"][row, length - (row % 3) * 2 :] = 0
    batch["attention_mask"][:, 0] = 1
    name = type(model).__name__
    if name.endswith("SequenceClassification"):
        batch["labels"] = torch.randint(LABELS, (rows,), generator=generator)
    else:
        batch["labels"] = torch.randint(VOCAB, (rows, length), generator=generator)
        batch["labels"][batch["attention_mask"] == 0] = -100
        batch["labels"][0, : length // 2] = -100
    return batch


def one_by_one(batch):
    rows = len(batch["input_ids"])
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(rows)]


def assert_same(one, other, rtol=1e-4, atol=1e-7):
    assert one.parts() == other.parts()
    for (part, block, a), (_, _, b) in zip(one.items(), other.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, p=part, i=block: f"{p} {i}: {m}")


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_have_the_shapes_of_the_model_in_every_family(family, name):
    model = make(family)
    criterion = NAMED[name]
    scores = score(model, criterion, criterion.parts, [batch_for(model)])
    shapes = full(model, criterion.parts)
    assert scores.parts() == shapes.parts()
    for (_, _, a), (_, _, b) in zip(scores.items(), shapes.items(), strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32 and a.device.type == "cpu"


@pytest.mark.parametrize("head", ["classification", "language"])
@pytest.mark.parametrize(
    "name, labels",
    [*((name, "given") for name in WITH_DATA), *((name, "self") for name in BY_GRADIENT if name != "movement")],
)
@pytest.mark.parametrize("of", ["bert", "gpt2"])
def test_scores_do_not_depend_on_the_batch_size(of, name, labels, head):
    criterion = NAMED[name]
    model = make(of, head)
    batch = batch_for(model)
    whole = score(model, criterion, criterion.parts, [batch], labels=labels)
    single = score(model, criterion, criterion.parts, one_by_one(batch), labels=labels)
    # entropy jumps where a value lies on the edge of a bin
    assert_same(whole, single, rtol=2e-3 if name == "activation_entropy" else 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WITH_DATA)
def test_padding_does_not_count(family, name):
    model = make(family, "classification" if family.name != "gpt2" else "language")
    criterion = NAMED[name]
    batch = batch_for(model)
    wide = {
        k: torch.nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) if v.dim() == 2 else v
        for k, v in batch.items()
    }
    wide["input_ids"][:, LENGTH:] = 7
    labels = "given"
    padded_rows = {k: torch.cat([v, v[:1]]) for k, v in wide.items()}
    padded_rows["attention_mask"][-1] = 0
    expected = score(model, criterion, criterion.parts, [batch], labels=labels)
    assert_same(score(model, criterion, criterion.parts, [padded_rows], labels=labels), expected, atol=1e-6)


def test_own_labels_do_not_depend_on_padding_either():
    model = make("gpt2", "language")
    batch = batch_for(model)
    wide = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    scores = [score(model, "fisher", ["heads"], [b], labels="self") for b in (batch, wide)]
    assert_same(*scores, atol=1e-6)


@pytest.mark.parametrize("head", ["classification", "language"])
def test_gate_gradients_are_those_of_each_example_alone(family, head):
    model = make(family, head)
    batch = batch_for(model)
    scores = score(model, "taylor_gates", ["heads", "neurons", "attention"], [batch])
    expected = full(model, ["heads", "neurons", "attention"], 0.0, torch.float32)
    for row in one_by_one(batch):
        with Gates(model, expected.parts()) as gates:
            ones = full(model, expected.parts(), 1.0, torch.float32).map(lambda t: t.requires_grad_())
            gates.set(ones)
            model(**row).loss.backward()
        expected = expected.zip(ones, lambda total, leaf: total + leaf.grad.abs() / ROWS)
    assert_same(scores, expected)


OUTSIDE = ("dense", "classifier", "out_proj", "pre_classifier", "score")
"""Last names of the matrices outside the blocks that read the stream, in classifiers."""


def test_gates_of_the_stream_count_what_each_matrix_reads_once(family):
    model = make(family)
    batch = batch_for(model)
    slopes = []
    for row in one_by_one(batch):
        model.zero_grad()
        model(**row).loss.backward()
        readers = [
            block.get(name)
            for block in anatomy_of(model).blocks
            for name in ("qkv", "query", "key", "value", "ffn_in")
            if getattr(block.family, name)
        ]
        readers += [
            module
            for name, module in model.named_modules()
            if name.split(".")[-1] in OUTSIDE and ".layer." not in name and isinstance(module, torch.nn.Linear)
        ]
        products = [(m.weight * m.weight.grad).detach().sum(1 if is_conv1d(m) else 0) for m in readers]
        slopes.append(torch.stack(products).sum(0))
    model.zero_grad()
    together = torch.stack(slopes)
    assert_same(score(model, "taylor_gates", ["hidden"], [batch]), Units(hidden=together.abs().mean(0)))
    assert_same(score(model, "fisher", ["hidden"], [batch]), Units(hidden=together.square().mean(0) / 2), rtol=1e-3)


def test_weight_taylor_is_the_product_of_weights_and_their_gradients(family):
    model = make(family)
    batch = batch_for(model)
    parts = ["heads", "neurons", "attention", "ffn", "layers"]
    scores = score(model, "taylor_weights", parts, [batch])
    heads, neurons, attention, ffn = (torch.zeros(LAYERS, n) for n in (HEADS, FFN, 1, 1))
    for row in one_by_one(batch):
        model.zero_grad()
        model(**row).loss.backward()
        for index, block in enumerate(anatomy_of(model).blocks):
            out, first, second = (block.get(name) for name in ("attention_out", "ffn_in", "ffn_out"))

            def product(module):
                gradient = module.weight.grad.t() if is_conv1d(module) else module.weight.grad
                return weight_view(module).detach() * gradient, module.bias.detach() * module.bias.grad

            (w_out, b_out), (w_first, b_first), (w_second, b_second) = map(product, (out, first, second))
            by_head = w_out.sum(0).unflatten(0, (HEADS, -1)).sum(-1)
            by_first = w_first.sum(1) + b_first
            heads[index] += by_head.abs() / ROWS
            neurons[index] += (by_first.abs() + w_second.sum(0).abs()) / ROWS
            of_attention = (w_out.sum() + b_out.sum()).abs()
            of_ffn = (w_second.sum() + b_second.sum()).abs() + by_first.sum().abs()
            attention[index] += of_attention / ROWS
            ffn[index] += of_ffn / ROWS
    model.zero_grad()
    attention, ffn = attention[:, 0], ffn[:, 0]
    expected = Units(heads=tuple(heads), neurons=tuple(neurons), attention=attention, ffn=ffn, layers=attention + ffn)
    assert_same(scores, expected)


def test_l1_and_l2_are_sums_over_what_is_cut_together(family):
    model = make(family)
    for name, power in (("l1", 1), ("l2", 2)):
        scores = score(model, name, PARTS)
        block = anatomy_of(model).blocks[1]
        whole = sum((p.detach().abs() ** power).sum() for p in block.module.parameters()) ** (1 / power)
        torch.testing.assert_close(scores.layers[1], whole)
        column = weight_view(block.get("ffn_out"))[:, 3].detach()
        row, bias = weight_view(block.get("ffn_in"))[3].detach(), block.get("ffn_in").bias[3].detach()
        group = torch.cat([column, row, bias[None]])
        torch.testing.assert_close(scores.neurons[1][3], group.norm(p=power))
    attention = score(model, "l1", ["attention", "heads"])
    # heads together are the attention without the bias that belongs to none
    rest = torch.stack([b.get("attention_out").bias.detach().abs().sum() for b in anatomy_of(model).blocks])
    torch.testing.assert_close(torch.stack([h.sum() for h in attention.heads]) + rest, attention.attention)


def test_self_supervised_scores_of_a_regression_head_are_not_zero(family):
    model = make(family, num_labels=1)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    for name in ("taylor_gates", "taylor_weights", "fisher"):
        scores = score(model, name, ["heads", "neurons"], [batch], labels="self")
        assert all(bool((t > 0).any()) for _, _, t in scores.items())


def test_self_supervised_regression_is_the_gradient_of_the_output():
    model = make("bert", num_labels=1)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    scores = score(model, "taylor_gates", ["heads"], [batch], labels="self", seed=5)
    expected = torch.zeros(LAYERS, HEADS)
    for row in one_by_one(batch):
        with Gates(model, ["heads"]) as gates:
            ones = full(model, ["heads"], 1.0, torch.float32).map(lambda t: t.requires_grad_())
            gates.set(ones)
            model(**row).logits.sum().backward()
        expected += torch.stack([t.grad.abs() for t in ones.heads]) / ROWS
    model.zero_grad()
    assert_same(scores, Units(heads=tuple(expected)))


def test_self_supervised_fisher_is_the_curvature_of_the_divergence():
    model = make("bert").double()
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    scores = score(model, "fisher", ["heads"], [batch], labels="self")
    with torch.no_grad():
        p = model(**batch).logits.log_softmax(-1)

        def divergence(block, head, value):
            values = full(model, ["heads"], 1.0, torch.float64)
            values.heads[block][head] = value
            with Gates(model, ["heads"]) as gates:
                gates.set(values)
                q = model(**batch).logits.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())

        step = 1e-3
        for block, head in ((0, 1), (2, 3)):
            # KL = step^2 * Fisher / 2, which is step^2 times the score
            measured = (divergence(block, head, 1 + step) + divergence(block, head, 1 - step)) / 2 / step**2
            assert measured == pytest.approx(float(scores.heads[block][head]), rel=1e-3)


def test_a_model_without_a_head_scores_itself(family):
    model = make(family, "base")
    batch = inputs(model)
    scores = score(model, "taylor_gates", ["heads", "neurons"], [batch], labels="self")
    assert all(bool((t > 0).any()) for _, _, t in scores.items())


def test_own_labels_of_many_classes_tokens_and_several_labels():
    for kwargs in ({"num_labels": 20}, {"num_labels": 4, "problem_type": "multi_label_classification"}):
        model = make("bert", **kwargs)
        scores = score(model, "fisher", ["heads"], [inputs(model)], labels="self")
        assert all(bool((t > 0).all()) for t in scores.heads)
    model = make("bert", "tokens")
    assert score(model, "fisher", ["heads"], [inputs(model)], labels="self").heads[0].min() > 0


def test_drawn_labels_follow_the_seed():
    model = make("gpt2", "language")
    one, same, other = (
        score(model, "fisher", ["heads"], [inputs(model)], labels="self", seed=seed).heads[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_causal_model_takes_its_text_for_labels():
    model = make("gpt2", "language")
    batch = inputs(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert_same(
        score(model, "fisher", ["heads"], [batch]), score(model, "fisher", ["heads"], [{**batch, "labels": labels}])
    )


def test_several_float_labels_are_scored():
    model = make("bert", problem_type="multi_label_classification")
    batch = {**inputs(model), "labels": torch.rand(3, LABELS).round()}
    assert score(model, "fisher", ["heads"], [batch]).heads[0].min() > 0


@pytest.mark.parametrize("family", [*FAMILIES, LLAMA], ids=str)
def test_attention_entropy_is_that_of_the_attention(family):
    model = make(family)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    scores = score(model, "attention_entropy", ["heads"], [batch])
    mask = batch["attention_mask"].bool()
    _, features = extract(model, batch, [("probabilities", 2)])
    probabilities = features["probabilities", 2].double()
    total, count = torch.zeros(probabilities.shape[1], dtype=torch.float64), 0
    for row in range(ROWS):
        for query in range(LENGTH):
            seen = int(mask[row, : query + 1].sum() if anatomy_of(model).causal else mask[row].sum())
            if mask[row, query] and seen > 1:
                p = probabilities[row, :, query]
                total -= (p * p.clamp_min(1e-30).log()).sum(-1) / torch.log(torch.tensor(float(seen)))
                count += 1
    # a unit is a key head with its queries
    of_units = (1 - total / count).unflatten(0, (HEADS, -1)).mean(dim=-1)
    torch.testing.assert_close(scores.heads[1], of_units.float(), rtol=1e-4, atol=1e-5)


def test_activation_scores_are_those_of_recorded_activations(family):
    model = make(family)
    batch = batch_for(model)
    kept = {}
    block = anatomy_of(model).blocks[1]
    handles = [
        block.get(name).register_forward_pre_hook(lambda _, args, n=name: kept.__setitem__(n, args[0].detach()))
        for name in ("ffn_out", "attention_out")
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    neurons, heads = kept["ffn_out"][mask], kept["attention_out"][mask]
    parts = ["heads", "neurons"]
    means = score(model, "mean_activation", parts, [batch])
    torch.testing.assert_close(means.neurons[1], neurons.abs().mean(0))
    torch.testing.assert_close(means.heads[1], heads.unflatten(-1, (HEADS, -1)).norm(dim=-1).mean(0))
    strict = replace(CRITERIA["apoz"], function=partial(criteria.apoz, epsilon=0.2))
    torch.testing.assert_close(
        score(model, strict, ["neurons"], [batch]).neurons[1], 1 - (neurons.abs() <= 0.2).float().mean(0)
    )
    root = neurons.double().square().mean(0).sqrt()
    expected = weight_view(block.get("ffn_out")).detach().abs().sum(0) * root
    torch.testing.assert_close(score(model, "wanda", parts, [batch]).neurons[1], expected.float())


def test_block_influence_is_that_of_hidden_states(family):
    model = make(family)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    states = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    influence = score(model, "block_influence", ["layers"], [batch]).layers
    # the last of GPT-2's hidden states has been through the final norm
    for index in range(LAYERS - 1):
        similarity = torch.cosine_similarity(states[index][mask], states[index + 1][mask], dim=-1).detach()
        assert float(influence[index]) == pytest.approx(1 - float(similarity.mean()), rel=1e-3)


def test_movement_has_both_signs_and_is_minus_the_gradient():
    model = make("bert")
    batch = batch_for(model)
    moved = score(model, "movement", ["neurons"], [batch])
    values = torch.cat(moved.neurons)
    assert values.min() < 0 < values.max()
    magnitude = score(model, "taylor_gates", ["neurons"], [batch])
    assert all((m.abs() <= t + 1e-7).all() for m, t in zip(moved.neurons, magnitude.neurons, strict=True))


def test_the_model_is_left_as_it_was():
    model = make("bert").train()
    model.base_model.embeddings.eval()
    next(model.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    for name in ("taylor_weights", "mean_activation", "block_influence", "attention_entropy"):
        score(model, name, [CRITERIA[name].parts[0]], [batch_for(model)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert trained == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CRITERIA)
def test_a_model_that_is_already_cut_can_be_scored(family, name):
    model = cut_unevenly(make(family))
    criterion = NAMED[name]
    scores = score(model, criterion, criterion.parts, [batch_for(model, rows=40)])
    if scores.heads is not None:
        assert [len(t) for t in scores.heads] == [2, 1]


def test_normalized_scores_have_norm_one_in_every_block():
    scores = normalized(Units(heads=(torch.rand(4), torch.rand(2)), layers=torch.tensor([3.0, 4.0])))
    assert [float(t.norm()) for t in scores.heads] == pytest.approx([1, 1])
    assert scores.layers.tolist() == [3, 4]


def test_empty_calibration_is_refused():
    with pytest.raises(LmcompressError, match="must have at least one batch, got none"):
        score(make("bert"), "mean_activation", ["neurons"], [])
    with pytest.raises(LmcompressError, match="fisher must have calibration data, got batches=None"):
        score(make("bert"), "fisher", ["neurons"])


@pytest.mark.parametrize("name", ["fisher", "mean_activation"])
def test_padding_alone_is_refused(name):
    model = make("bert")
    batch = batch_for(model)
    batch["attention_mask"].zero_()
    with pytest.raises(LmcompressError, match="got 2 batches of padding only"):
        score(model, name, ["neurons"], [batch, batch])


def test_missing_labels_are_refused():
    model = make("bert")
    with pytest.raises(LmcompressError, match=r"needs labels in every batch, got input_ids, attention_mask.*self"):
        score(model, "fisher", ["heads"], [inputs(model)])


def test_labels_that_never_count_are_refused():
    model = make("bert", "tokens")
    batch = {**inputs(model), "labels": torch.full((3, 9), -100)}
    with pytest.raises(LmcompressError, match="labels that count, got only -100"):
        score(model, "fisher", ["heads"], [batch])


def test_movement_refuses_labels_of_its_own():
    model = make("bert")
    with pytest.raises(LmcompressError, match="movement must have given labels, got labels='self'.*cancel"):
        score(model, "movement", ["heads"], [inputs(model)], labels="self")


def test_a_base_model_has_no_loss_on_labels():
    model = make("bert", "base")
    with pytest.raises(LmcompressError, match="BertModel must return logits"):
        score(model, "fisher", ["heads"], [{**inputs(model), "labels": torch.zeros(3, dtype=torch.long)}])


def test_unknown_names_are_refused():
    model = make("bert")
    with pytest.raises(LmcompressError, match="unknown criterion 'taylor_gate'; did you mean 'taylor_gates'"):
        score(model, "taylor_gate", ["heads"], [])
    with pytest.raises(LmcompressError, match="unknown part 'head'; did you mean 'heads'"):
        score(model, "l1", ["head"])
    with pytest.raises(LmcompressError, match="labels must be given or self, got 'selff'"):
        score(model, "fisher", ["heads"], [inputs(model)], labels="selff")
    with pytest.raises(LmcompressError, match="at least one of heads.*got none"):
        score(model, "l1", [])


def test_a_criterion_that_does_not_fit_a_part_is_refused():
    with pytest.raises(LmcompressError, match="apoz scores neurons, got heads; criteria for heads are l1"):
        score(make("bert"), "apoz", ["heads"], [])


def test_nan_is_refused_with_its_block():
    model = make("bert")
    with torch.no_grad():
        anatomy_of(model).blocks[2].get("ffn_in").weight[5] = float("nan")
    with pytest.raises(LmcompressError, match="got nan from l1 for neurons in block 2"):
        score(model, "l1", ["neurons"])


def test_equal_scores_are_refused():
    model = make("bert")
    with torch.no_grad():
        for block in anatomy_of(model).blocks:
            for name in ("ffn_in", "ffn_out"):
                for parameter in block.get(name).parameters():
                    parameter.fill_(0.5)
    with pytest.raises(LmcompressError, match=r"must differ, got 16.5 from l1 for all 72 neurons.*at random"):
        score(model, "l1", ["neurons"])


def test_zero_scores_are_refused():
    model = make("bert")
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(LmcompressError, match="got zero from taylor_gates for all 12 heads"):
        score(model, "taylor_gates", ["heads"], [batch_for(model)])


def test_one_unit_cannot_be_compared_but_is_not_refused():
    check_scores(Units(layers=torch.tensor([2.0])), "l1")


def test_random_scores_differ_by_seed_and_need_no_data():
    model = make("gpt2")
    one, two, three = (score(model, "random", PARTS, seed=seed) for seed in (0, 0, 1))
    assert_same(one, two)
    assert not torch.equal(one.hidden, three.hidden) and len(one.hidden) == HIDDEN
