"""Documents packed into one row by position ids are compared and counted as if each had a row of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from families import make, set_dropout
from torch import Tensor
from training import tiny_arguments
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from two_tokenizers import language_model, tokenizer_of

from lmcompress.activations.capture import Capture, extract, resolve
from lmcompress.activations.documents import documents_in, documents_of
from lmcompress.data import Task, collator, pack_documents
from lmcompress.distillation import Distillation, DistillationConfig
from lmcompress.distillation.config import Contrast, EmdMatch, Match
from lmcompress.distillation.matches import MATCHES
from lmcompress.distillation.store import TeacherStore
from lmcompress.distillation.store.teacher import StoredTeacher
from lmcompress.families import FAMILIES
from lmcompress.pruning.structured.scoring import score
from lmcompress.students import by_layers, separate
from lmcompress.trainers import CompressionTrainer
from lmcompress.trainers.counting import count_vector

LENGTHS = (5, 9, 2, 7)


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {"input_ids": column("input_ids", 0), "attention_mask": column("attention_mask", 0)}
    return batch | ({"labels": column("labels", -100)} if "labels" in rows[0] else {})


def flattened(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = DataCollatorWithFlattening()(rows)
    return {name: value for name, value in batch.items() if name != "labels" or "labels" in rows[0]}


def models(head: str = "language") -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = make("gpt2", head, seed=2)
    set_dropout(teacher, 0.0)
    return by_layers(teacher, 2).model, teacher


def every_match() -> tuple[Match, ...]:
    made = []
    for name in sorted({match.name for match in MATCHES.values()}):
        layers: tuple[Any, Any] = (2, 3) if MATCHES[name].layers == 1 else ((1, 2), (2, 3))
        for feature in MATCHES[name].features if len(MATCHES[name].features) > 1 else (None,):
            options = {"position": -1} if name == "pkd" else {}
            made.append(Match(loss=name, student=layers[0], teacher=layers[1], on=feature, options=options))
    return tuple(made)


def logged(
    folder, config: DistillationConfig, collator, *, labels: bool = True, teacher: Any = None, head="language", **args
) -> dict[str, float]:
    """The losses of the first optimizer step."""
    student, live = models(head)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [{"input_ids": ids} | ({"labels": ids} if labels else {}) for ids in documents()]
    if head == "tokens":
        rows = [row | {"labels": [i % 3 for i in row["input_ids"]]} for row in rows]
    sizes = {"per_device_train_batch_size": 4, "max_steps": 1, "remove_unused_columns": False}
    trainer = CompressionTrainer(
        student,
        args=tiny_arguments(folder, **(sizes | args)),
        methods=[Distillation(config, live if teacher is None else teacher)],
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
    )
    trainer.train()
    trainer.finish()
    return {name: v for name, v in trainer.state.log_history[0].items() if name.startswith(("loss_", "homogen"))}


CONFIGS = {
    "matches": DistillationConfig(matches=every_match(), homogeneity=True),
    "nearest": DistillationConfig(matches=(Match(loss="hidden_mse", student="nearest", teacher=2),)),
    "contrast": DistillationConfig(contrast=Contrast(), token_scaling=2.0),
    "sequences": DistillationConfig(contrast=Contrast(level="sequence")),
    "vocabulary": DistillationConfig(weight=0, contrast=Contrast(memory="none", negatives="student")),
    "emd": DistillationConfig(emd=EmdMatch(), token_scaling=2.0, loss="jsd"),
}


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "none"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_documents_are_as_padded_ones(tmp_path, config, labels):
    if config.emd is not None:
        pytest.importorskip("ot")
    right = logged(tmp_path, config, padded, labels=labels)
    assert logged(tmp_path, config, flattened, labels=labels) == pytest.approx(right, rel=2e-5, abs=1e-6)


def test_packed_tokens_are_classified_as_padded_ones(tmp_path):
    config = DistillationConfig(matches=every_match(), token_scaling=3.0)
    right = logged(tmp_path, config, padded, head="tokens")
    packed = DataCollatorWithFlattening(separator_id=-100)

    def whole(rows):
        # a classifier of tokens has a label for the first of each document too
        return packed(rows) | {"labels": torch.tensor([sum((row["labels"] for row in rows), [])])}

    assert logged(tmp_path, config, whole, head="tokens") == pytest.approx(right, rel=2e-5)


def test_a_packed_step_does_not_depend_on_its_micro_batches(tmp_path):
    config = DistillationConfig(matches=every_match())
    whole = logged(tmp_path, config, flattened, labels=False)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert logged(tmp_path, config, flattened, labels=False, **split) == pytest.approx(whole, rel=2e-5)


def test_a_store_of_documents_teaches_where_they_are_packed(tmp_path):
    matches = (Match(loss="hidden_mse", student=2, teacher=3), Match(loss="minilmv2_value", student=2, teacher=3))
    config = DistillationConfig(matches=matches)
    rows = [{"input_ids": ids} for ids in documents()]
    features = [("hidden", 3), ("values", 3)]
    teacher = models()[1]
    store = TeacherStore.build(
        tmp_path / "store", teacher, rows, padded, extract=extract, features=features, dtype="float32", progress=False
    )
    right = logged(tmp_path / "live", config, flattened)
    found = logged(tmp_path / "stored", config, flattened, teacher=StoredTeacher(store))
    assert found == pytest.approx(right, rel=1e-4)
    with pytest.raises(Exception, match="stored by document, got several packed into one row"):
        TeacherStore.build(
            tmp_path / "packed", teacher, rows, flattened, extract=extract, features=features, progress=False
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["probabilities", "scores", "queries", "values", "hidden", "output"])
def test_features_of_packed_documents_are_those_of_each_alone(kind, name):
    teacher = make(name, "language", seed=2)
    batch = flattened([{"input_ids": ids} for ids in documents()])
    feature = resolve(teacher, kind, -1)
    with Capture(teacher, [feature]) as capture, torch.no_grad():
        teacher(**batch, use_cache=False)
        packed = capture.take(documents_of(teacher, batch))[feature]
        for row, ids in zip(packed, documents(), strict=True):
            teacher(input_ids=torch.tensor([ids]))
            alone = capture.take()[feature][0]
            cut = row[tuple(slice(0, n) for n in alone.shape)]
            torch.testing.assert_close(cut, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [[[3, 2], [5]], [[1, 1, 3], [4, 1], [5]]])
def test_documents_are_found_in_every_row_and_put_back(rows):
    length = 5
    positions = torch.tensor([sum(([*range(n)] for n in row), []) for row in rows])
    ids = torch.arange(len(rows) * length).view(len(rows), length)
    found = documents_in({"input_ids": ids, "position_ids": positions})
    assert found is not None and found.mask.sum(1).tolist() == sum(rows, [])
    split = found.of_inputs({"input_ids": ids, "labels": ids, "number": torch.ones(len(rows))})
    assert torch.equal(found.packed(split["input_ids"]), ids) and "number" not in split
    assert split["labels"][found.mask == 0].eq(-100).all() and torch.equal(found.begins, positions == 0)


def test_what_is_not_packed_has_no_documents():
    ids = torch.ones(2, 4, dtype=torch.long)
    positions = torch.arange(4).expand(2, 4)
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert documents_in({"input_ids": ids}) is None
    assert documents_in({"input_ids": ids, "position_ids": positions}) is None
    assert documents_in({"input_ids": ids, "position_ids": packed, "attention_mask": ids}) is None
    assert documents_of(make("bert"), {"input_ids": ids, "position_ids": packed}) is None


def test_a_family_is_said_to_pack_if_its_models_keep_documents_apart(family):
    model = make(family, "base")
    ids = torch.randint(2, 60, (1, 8))
    positions = torch.tensor([[2, 3, 4, 5, 2, 3, 4, 5]])
    other = ids.clone()
    other[0, :4] = ids[0, :4].flip(0)
    cache = {"use_cache": False} if family.name == "gpt2" else {}
    with torch.no_grad():
        first, second = (model(input_ids=i, position_ids=positions, **cache)[0][0, 4:] for i in (ids, other))
    packed = documents_of(model, {"input_ids": ids, "position_ids": positions}) is not None
    assert torch.allclose(first, second, atol=1e-5) == packed


@pytest.mark.parametrize("labels", [True, False])
def test_units_are_counted_by_document(labels):
    rows = [{"input_ids": ids} | ({"labels": ids} if labels else {}) for ids in documents()]
    reading = {"causal": True, "shifted": True, "packs": True}
    assert torch.equal(count_vector(flattened(rows), **reading), count_vector(padded(rows), **reading))


def test_calibration_reads_documents_apart():
    rows = [{"input_ids": ids} for ids in documents()]
    for criterion in ("attention_entropy", "wanda", "fisher", "taylor_gates"):
        right, found = (score(models()[1], criterion, ["heads"], [batch]) for batch in (padded(rows), flattened(rows)))
        for (part, _, one), (_, _, other) in zip(right.items(), found.items(), strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, part=part: f"{part}: {text}")


def test_local_mixing_refuses_packed_documents():
    model = make("gpt2", "language")
    rows = [{"input_ids": ids} for ids in documents()]
    separate(model, [1], 3, [padded(rows)], ridge=0.1)
    with pytest.raises(Exception, match="mixes neighbours.*packed"):
        model(**flattened(rows), use_cache=False)


CAUSAL = {
    "gpt2": lambda **more: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=64, **more),
    **{
        name: lambda kind=kind, **more: kind(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
            intermediate_size=24, vocab_size=64, initializer_range=0.3, **more,
        )
        for name, kind in dict(llama=LlamaConfig, mistral=MistralConfig, qwen2=Qwen2Config, qwen3=Qwen3Config).items()
    },
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
def test_transformers_keeps_packed_documents_apart_as_their_family_says(name, kernel):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CAUSAL[name](), attn_implementation=kernel).eval()
    rows = [{"input_ids": ids, "labels": ids} for ids in documents()]
    batch = flattened(rows)
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        alone = [
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False) for ids in documents()
        ]
    torch.testing.assert_close(packed.logits[0], torch.cat([one.logits[0] for one in alone]), atol=1e-5, rtol=1e-4)
    predicted = [length - 1 for length in LENGTHS]
    whole = sum(float(one.loss) * count for one, count in zip(alone, predicted, strict=True))
    assert float(packed.loss) * sum(predicted) == pytest.approx(whole, rel=1e-5)
    assert name not in FAMILIES or FAMILIES[name].packs


def test_packed_blocks_of_documents_train_as_each_document_alone(tmp_path):
    texts = ["the cat sat on the mat", "no film is that bad", "she sat in the tree"]
    tokenizer = tokenizer_of(300)
    length = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    blocks = pack_documents(texts, tokenizer, length)
    alone = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in alone])
    task = Task("mine", "causal_lm", ("text",))
    found = []
    for data in (blocks, rows):
        student, teacher = language_model(tokenizer), language_model(tokenizer, seed=1)
        trainer = CompressionTrainer(
            student, tiny_arguments(tmp_path, max_steps=1, learning_rate=1e-3), train_dataset=data, teacher=teacher,
            data_collator=collator(task, tokenizer),
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("loss_kd", "loss_label"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
