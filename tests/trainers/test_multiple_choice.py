"""Models of multiple choice: batches of (rows, choices, length) through training, cutting, packing and reloading."""

from __future__ import annotations

import pytest
import torch
from families import BY_NAME, VOCAB
from transformers import BertForMultipleChoice, TrainingArguments

from lmcompress.activations.capture import Capture
from lmcompress.checkpoint.saving import random_batches
from lmcompress.distillation import DistillationConfig, Match
from lmcompress.evaluation import evaluate_classifier
from lmcompress.model import CompressedModel
from lmcompress.pruning import PruningConfig, Target
from lmcompress.quantization import QuantizationConfig
from lmcompress.trainers import CompressionTrainer, DistillationTrainer

LENGTHS = ((4, 9, 6), (7, 5, 3), (8, 8, 2), (3, 4, 5))
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(seed):
    torch.manual_seed(seed)
    config = BY_NAME["bert"].make_config(**NO_DROPOUT, initializer_range=0.3)
    return BertForMultipleChoice(config).eval()


def rows_of():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths],
            "labels": number % 3,
        }
        for number, lengths in enumerate(LENGTHS)
    ]


def collate(rows):
    longest = max(len(ids) for row in rows for ids in row["input_ids"])
    ids = torch.tensor([[one + [0] * (longest - len(one)) for one in row["input_ids"]] for row in rows])
    mask = torch.tensor([[[1] * len(one) + [0] * (longest - len(one)) for one in row["input_ids"]] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def trainer_of(student, folder, cls=DistillationTrainer, size=4, **settings):
    args = TrainingArguments(
        str(folder), max_steps=2, learning_rate=0.05, optim="sgd", max_grad_norm=0.0, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
    )  # fmt: skip
    return cls(student, args, train_dataset=rows_of(), data_collator=collate, **settings)


MATCHED = DistillationConfig(
    temperature=2.0,
    matches=(
        Match(loss="hidden_mse", student=3, teacher=3),
        Match(loss="attention_mse", on="probabilities", student=2, teacher=2),
    ),
)


def test_features_are_captured_choice_by_choice():
    model, batch = model_of(1), collate(rows_of())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with Capture(model, [("probabilities", 2)]) as capture, torch.no_grad():
        model(**inputs)
        together = capture.take()[("probabilities", 2)]
        for row, lengths in enumerate(LENGTHS):
            for choice, n in enumerate(lengths):
                model(**{name: value[row, choice : choice + 1, :n][None] for name, value in inputs.items()})
                alone = capture.take()[("probabilities", 2)][0]
                torch.testing.assert_close(together[3 * row + choice, :, :n, :n], alone, rtol=1e-4, atol=1e-6)


def test_gradient_accumulation_does_not_change_the_step(tmp_path):
    trained = []
    for size in (4, 1):
        student = model_of(1)
        trainer_of(student, tmp_path, size=size, teacher=model_of(2), distillation=MATCHED).train()
        trained.append(student.state_dict())
    before = model_of(1).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in trained[0].items())
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", ["given", "self"])
def test_a_student_is_pruned_quantized_and_distilled_in_one_run(tmp_path, labels):
    trainer = trainer_of(
        model_of(1), tmp_path, CompressionTrainer, teacher=model_of(2), distillation=DistillationConfig(),
        pruning=PruningConfig(target=Target(sparsity=0.4), labels=labels), quantization=QuantizationConfig(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = BertForMultipleChoice.from_pretrained(tmp_path / "saved")
    batch = {name: collate(rows_of())[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.student(**batch).logits)


def test_the_round_trip_check_and_evaluation_read_choices(tmp_path):
    model = model_of(1)
    batches = random_batches(model)
    assert {batch["input_ids"].dim() for batch in batches} == {3}
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0
    found = evaluate_classifier(model, rows_of(), collate, "classification", ["accuracy"], batch_size=2, progress=False)
    with torch.no_grad():
        said = model(**collate(rows_of())).logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(float((said == torch.tensor([0, 1, 2, 0])).float().mean()))
