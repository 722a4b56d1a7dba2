"""What is shared, and how shared values are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from families import inputs, make, outputs, set_dropout
from packing import packed
from pydantic import ValidationError
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from training import tiny_arguments
from transformers import AutoModelForSequenceClassification

from lmcompress import CompressedModel, LmcompressError
from lmcompress.clustering import SharingConfig, SharingRule, WeightSharing, fisher_diagonal, share_weights
from lmcompress.clustering.kmeans import look_up
from lmcompress.families.weights import weighted_modules
from lmcompress.pruning.unstructured import GroupLassoConfig, GroupRule, GroupSparsity, Sparsity, SparsityConfig
from lmcompress.quantization import Quantization
from lmcompress.trainers import CompressionTrainer


class Small(nn.Module):
    """A network that is no transformer: a convolution, a hidden layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def pictures(count=16):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": torch.tensor(row % 3)}
        for row in range(count)
    ]


def trainer_of(folder, model, config, methods=(), **changes):
    args = tiny_arguments(folder, remove_unused_columns=False, **({"max_steps": 3, "max_grad_norm": 0.0} | changes))
    sharing = WeightSharing(config)
    return CompressionTrainer(
        model, args, methods=[sharing, *methods], train_dataset=pictures(), eval_dataset=pictures()
    ), sharing


def distinct(weight):
    return len(weight.detach().unique())


def test_projections_and_word_embeddings_of_every_family_share_and_nothing_else_does(family):
    model = make(family, "language")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = share_weights(model, SharingConfig(clusters=5, embedding_clusters=7))
    shared = {row.path for row in report.matrices}
    known = weighted_modules(model)
    assert shared == {one.path for one in known if one.part and one.part not in ("head", "embedding_projection")}
    assert len(shared) == 1 + sum(one.block is not None for one in known)
    changed = set()
    for one in known:
        if one.path in shared:
            assert distinct(one.weight) <= (7 if one.part == "embeddings" else 5) + 1
            changed.add(id(one.weight))
    for name, parameter in model.named_parameters():
        if id(parameter) not in changed:
            assert torch.equal(parameter, before[name]), name
    assert torch.isfinite(outputs(model)).all()


def test_a_tied_head_shares_with_its_embeddings_and_is_counted_once():
    model = make("gpt2", "language")
    report = share_weights(model, SharingConfig(embedding_clusters=4))
    assert model.lm_head.weight is model.transformer.wte.weight and distinct(model.lm_head.weight) <= 4
    assert [row.path for row in report.matrices if row.part == "embeddings"] == ["wte"]
    assert "lm_head" not in report.untouched


def test_a_shared_model_saves_and_reloads_bit_exactly(tmp_path):
    model = make("bert")
    compressed = CompressedModel(model)
    report = share_weights(compressed)
    assert report.matrices and not report.trained
    compressed.save_pretrained(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(outputs(again), outputs(model))


def test_convolutions_and_layers_of_any_module_share():
    model = Small()
    report = share_weights(model, SharingConfig(clusters=6, convolution_clusters=3))
    assert distinct(model.features[0].weight) == 3 and distinct(model.head.weight) == 6
    assert [(row.path, row.clusters, row.weights) for row in report.matrices] == [
        ("features.0", 3, 36),
        ("head", 6, 432),
    ]
    assert report.matrices[1].index_bits == 3
    assert report.matrices[1].rate == pytest.approx(432 * 32 / (432 * 3 + 6 * 32))
    assert "head" in str(report) and report.to_dict()["matrices"][0]["clusters"] == 3


def test_a_rule_names_what_gets_more_or_nothing_and_the_later_one_counts():
    model = make("bert")
    rules = (
        SharingRule(modules="*", clusters=None),
        SharingRule(modules="ffn_in", clusters=9),
        SharingRule(modules="encoder.layer.1.*", clusters=2),
        SharingRule(modules="classifier", clusters=2),
    )
    report = share_weights(model, SharingConfig(rules=rules))
    assert {row.path: row.clusters for row in report.matrices if "layer.1." not in row.path} == {
        "encoder.layer.0.intermediate.dense": 9,
        "encoder.layer.2.intermediate.dense": 9,
        "classifier": 2,
    }
    assert report.untouched["embeddings.word_embeddings"] == "the config leaves it as it is"


def test_one_step_moves_each_value_by_the_sum_of_its_weights_gradients(tmp_path):
    model = Small()
    with torch.no_grad():
        model.head.weight[model.head.weight.abs() < 0.02] = 0
    start = copy.deepcopy(model)
    config = SharingConfig(clusters=4, convolution_clusters=4, codebook_learning_rate=0.05)
    trainer, sharing = trainer_of(
        tmp_path, model, config, max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        per_device_train_batch_size=16, weight_decay=0.1,
    )  # fmt: skip
    shared = sharing._shared
    books = {path: one.codebook.detach().clone().requires_grad_() for path, one in shared.items()}
    indices = {path: one.indices.clone() for path, one in shared.items()}
    trainer.train()
    looked_up = {f"{path}.weight": look_up(book, indices[path], zero=shared[path].zero) for path, book in books.items()}
    batch = {key: torch.stack([row[key] for row in pictures()]) for key in ("pixel_values", "labels")}
    functional_call(start, looked_up, kwargs=batch)["loss"].backward()
    assert shared["head"].zero and not shared["features.0"].zero
    for path, book in books.items():
        torch.testing.assert_close(shared[path].codebook.detach(), book.detach() - 0.05 * book.grad)
        assert torch.equal(shared[path].indices, indices[path])
    torch.testing.assert_close(model.head.bias.detach(), start.head.bias.detach() - 0.1 * start.head.bias.grad)


def test_zeros_stay_and_weights_are_what_they_share_all_the_time(tmp_path):
    model = Small()
    with torch.no_grad():
        model.head.weight[:, ::3] = 0
    zeros = model.head.weight == 0
    trainer, sharing = trainer_of(tmp_path, model, SharingConfig(clusters=8), learning_rate=0.01, max_steps=5)
    seen = []

    def look(*_):
        seen.append(distinct(model.head.weight))
        assert torch.equal(model.head.weight == 0, zeros)

    model.register_forward_hook(look)
    trainer.train()
    trainer.finish()
    assert len(seen) == 5 and set(seen) == {9}
    row = next(row for row in sharing.report.matrices if row.path == "head")
    assert (row.zeros, row.clusters) == (int(zeros.sum()), 8) and sharing.report.trained
    assert 0 < row.error < 0.1


def test_where_zeros_are_not_kept_they_are_values_like_others():
    model = Small()
    with torch.no_grad():
        model.head.weight[:, ::2] = 0
    share_weights(model, SharingConfig(clusters=4, keep_zeros=False))
    assert distinct(model.head.weight) == 4 and not (model.head.weight == 0).any()


def test_training_lowers_the_loss_by_codebooks_alone(tmp_path):
    model = Small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    trainer, _ = trainer_of(tmp_path, model, SharingConfig(clusters=16), max_steps=60, learning_rate=0.03)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_gradient_accumulation_does_not_change_the_codebooks(tmp_path):
    books = []
    for size, accumulation in [(8, 1), (1, 8)]:
        torch.manual_seed(0)
        trainer, sharing = trainer_of(
            tmp_path, Small(), SharingConfig(clusters=4), optim="sgd", learning_rate=0.1, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        books.append({path: shared.codebook.detach() for path, shared in sharing._shared.items()})
    torch.testing.assert_close(books[0], books[1], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_once_as_those_of_the_weights(tmp_path):
    moved, norms = [], []
    for limit in (1e9, 0.01):
        torch.manual_seed(0)
        trainer, sharing = trainer_of(
            tmp_path, Small(), SharingConfig(clusters=2), max_steps=1, optim="sgd", learning_rate=1.0,
            max_grad_norm=limit, per_device_train_batch_size=16, lr_scheduler_type="constant",
        )  # fmt: skip
        before = torch.cat([shared.codebook.detach() for shared in sharing._shared.values()])
        trainer.train()
        moved.append(torch.cat([shared.codebook.detach() for shared in sharing._shared.values()]) - before)
        norms.append(trainer.state.log_history[0]["grad_norm"])
    torch.testing.assert_close(moved[1], moved[0] * 0.01 / norms[0], rtol=1e-3, atol=1e-6)


def test_fisher_diagonal_is_the_sum_of_squared_gradients_and_leaves_the_model_alone():
    model = Small().train()
    model.head.weight.requires_grad_(False)
    batches = [{key: row[key].unsqueeze(0) for key in row} for row in pictures(5)]
    found = fisher_diagonal(model, [model.head.weight, model.features[0].weight], batches)
    assert model.training and not model.head.weight.requires_grad and model.features[0].weight.grad is None
    twin = copy.deepcopy(model).requires_grad_(True)
    sums = torch.zeros_like(twin.head.weight)
    for batch in batches:
        twin.zero_grad()
        twin(**batch)["loss"].backward()
        sums += twin.head.weight.grad.square()
    torch.testing.assert_close(found[0], sums)
    assert found[1].shape == model.features[0].weight.shape


def test_sensitive_weights_are_met_more_closely():
    model = Small()
    singles = [{key: row[key].unsqueeze(0) for key in row} for row in pictures()]
    fisher = fisher_diagonal(model, [model.head.weight], singles)[0]
    weighted = []
    for sensitivity in (False, True):
        twin = copy.deepcopy(model)
        share_weights(twin, SharingConfig(clusters=4, sensitivity=sensitivity), singles)
        weighted.append(float((fisher * (twin.head.weight - model.head.weight).square()).sum().detach()))
    assert weighted[1] < weighted[0]


def test_a_trainer_takes_its_rows_for_the_sensitivity(tmp_path):
    trainer, sharing = trainer_of(tmp_path, Small(), SharingConfig(clusters=4, sensitivity=True, calibration_rows=4))
    trainer.train()
    trainer.finish()
    assert sharing.report.matrices[1].clusters == 4


def test_what_computes_its_weight_is_refused(tmp_path):
    model = Small()
    parametrize.register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(LmcompressError, match="head must hold its weight as a plain parameter.*parametrized"):
        share_weights(model)
    share_weights(model, SharingConfig(rules=(SharingRule(modules="head", clusters=None),)))


def test_a_method_that_cuts_is_refused_in_the_same_run(tmp_path):
    class Cutting(WeightSharing):
        name = "cutting"
        changes_shapes = True

    with pytest.raises(LmcompressError, match="cutting must be done in a stage before weights are shared"):
        trainer_of(tmp_path, Small(), SharingConfig(), methods=[Cutting()])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        Sparsity(SparsityConfig(sparsity=0.5)),
        GroupSparsity(GroupLassoConfig(rules=[GroupRule(modules="*.query", groups="rows", keep=4)])),
        Quantization(),
    ],
    ids=lambda method: method.name,
)
def test_methods_that_change_single_weights_are_refused_before_training(tmp_path, other, first):
    methods = [other, WeightSharing(SharingConfig(clusters=4))]
    with pytest.raises(LmcompressError, match=f"{other.name} must be done in a stage before weights are shared"):
        CompressionTrainer(
            make("bert"), tiny_arguments(tmp_path), methods=methods if first else methods[::-1],
            train_dataset=pictures(),
        )  # fmt: skip


def test_weights_that_something_else_has_changed_are_refused_in_the_end(tmp_path):
    model = Small()
    trainer, _ = trainer_of(tmp_path, model, SharingConfig(clusters=4))
    trainer.auto_finish = False
    trainer.train()
    with torch.no_grad():
        model.features[0].weight.view(-1)[0] += 1.0
    with pytest.raises(LmcompressError, match=r"features\.0 no longer has its shared values, something has changed it"):
        trainer.finish()


def test_what_is_packed_is_refused():
    with pytest.raises(LmcompressError, match=r"cannot share the weights of a model that is packed already"):
        share_weights(packed(make("bert")), SharingConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SharingConfig(rules=(SharingRule(modules="haed", clusters=4),)), r"'haed' matches no matrix.*mean 'head'"),
        (SharingConfig(clusters=None, convolution_clusters=None), r"nothing of this Small would share.*leaves it"),
        (SharingConfig(sensitivity=True), r"sensitivity must be measured on data, got none"),
    ],
)
def test_what_does_nothing_is_refused_and_the_model_is_as_it_was(config, message):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LmcompressError, match=message):
        share_weights(model, config)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused_by_name_before_any_is_changed():
    model = Small()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = model.features[0].weight.detach().clone()
    with pytest.raises(LmcompressError, match=r"head: values to cluster must be finite"):
        share_weights(model)
    assert torch.equal(model.features[0].weight, before)


def test_sensitivity_without_labels_or_batches_is_refused():
    model = Small()
    with pytest.raises(LmcompressError, match=r"needs a loss, got a Small.*labels"):
        fisher_diagonal(model, [model.head.weight], [{"pixel_values": torch.randn(1, 1, 8, 8)}])
    with pytest.raises(LmcompressError, match=r"needs at least one batch, got none"):
        fisher_diagonal(model, [model.head.weight], [])


@pytest.mark.parametrize("field", ["clusters", "convolution_clusters", "embedding_clusters"])
@pytest.mark.parametrize("value", [0, 65537, 2.5, True])
def test_numbers_of_clusters_are_whole_and_in_range(field, value):
    with pytest.raises(ValidationError, match=field):
        SharingConfig(**{field: value})


def test_a_misspelt_field_is_refused():
    with pytest.raises(ValidationError, match="cluster"):
        SharingConfig(cluster=4)


def test_a_shared_model_of_transformers_computes_as_before_up_to_its_error():
    model = make("roberta")
    set_dropout(model, 0.0)
    batch = inputs(model)
    before = model(**batch).logits.detach()
    share_weights(model, SharingConfig(clusters=4096, embedding_clusters=4096))
    torch.testing.assert_close(model(**batch).logits, before)
