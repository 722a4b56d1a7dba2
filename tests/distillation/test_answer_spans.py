"""Distillation of the two ends of an answer, and pruning by its loss."""

from __future__ import annotations

import copy

import pytest
import torch
from families import BY_NAME, VOCAB
from transformers import BertForQuestionAnswering, BertForTokenClassification, TrainingArguments

from lmcompress.distillation import DistillationConfig
from lmcompress.errors import LmcompressError
from lmcompress.method import Step
from lmcompress.pruning import PruningConfig, Target
from lmcompress.pruning.structured.objectives import label_objective, own_objectives
from lmcompress.quantization import QuantizationConfig
from lmcompress.trainers import CompressionTrainer, DistillationTrainer

LENGTHS = (9, 5, 7, 12)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(seed, cls=BertForQuestionAnswering):
    torch.manual_seed(seed)
    return cls(BY_NAME["bert"].make_config(**NO_DROPOUT, initializer_range=0.3, num_labels=2)).eval()


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    ids = torch.randint(2, VOCAB, (len(lengths), longest), generator=generator) * mask
    starts = torch.tensor([1, 0, 2, 5][: len(lengths)])
    ends = torch.tensor([3, 0, 6, 5][: len(lengths)])
    return {"input_ids": ids, "attention_mask": mask, "start_positions": starts, "end_positions": ends}


def rows_of(lengths):
    batch = batch_of(lengths)
    return [
        {name: values[i][:n].tolist() if values.dim() > 1 else int(values[i]) for name, values in batch.items()}
        for i, n in enumerate(lengths)
    ]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([v + [0] * (longest - len(v)) if isinstance(v := row[name], list) else v for row in rows])
        for name in rows[0]
    }


def trainer_of(student, teacher, config=None, cls=DistillationTrainer, folder="unused", **settings):
    values = dict(
        max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True, per_device_train_batch_size=4,
    )  # fmt: skip
    methods = {name: settings.pop(name) for name in ("pruning", "quantization") if name in settings}
    args = TrainingArguments(folder, **values | settings)
    rows = rows_of(LENGTHS)
    return cls(
        student, args, teacher=teacher, distillation=config, train_dataset=rows, data_collator=collate, **methods
    )


def kd_of(student, teacher, batch, config, folder):
    trainer = trainer_of(student, teacher, config, folder=str(folder))
    method = trainer.methods[0]
    names = ("input_ids", "attention_mask")
    step = Step(student, batch, {name: batch[name] for name in names}, 0.0)
    step.outputs = student(**step.student_inputs)
    found = method.loss_terms(step)["kd"]
    trainer.finish()
    return found


@pytest.mark.parametrize("loss", ["kl", "ce", "reverse_kl", "jsd"])
def test_the_loss_is_the_mean_of_both_ends_over_real_tokens(loss, tmp_path):
    student, teacher, batch = model_of(1), model_of(2), batch_of(LENGTHS)
    config = DistillationConfig(temperature=2.0, loss=loss, label_weight=0.0)
    found = kd_of(student, teacher, batch, config, tmp_path)
    assert found.unit == "examples"
    expected = 0.0
    for i, n in enumerate(LENGTHS):
        # each row by itself, without padding
        one = {name: batch[name][i : i + 1, :n] for name in ("input_ids", "attention_mask")}
        mine, theirs = student(**one), teacher(**one)
        for side in ("start_logits", "end_logits"):
            log_q, log_p = ((out[side][0] / 2).log_softmax(-1) for out in (mine, theirs))
            p, q = log_p.exp(), log_q.exp()
            m = (p + q) / 2
            expected += 4 / 2 * {
                "kl": (p * (log_p - log_q)).sum(),
                "ce": -(p * log_q).sum(),
                "reverse_kl": (q * (log_q - log_p)).sum(),
                "jsd": ((p * (log_p - m.log())).sum() + (q * (log_q - m.log())).sum()) / 2,
            }[loss]  # fmt: skip
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-4)


def test_it_is_zero_at_the_teacher_and_padding_has_no_gradient(tmp_path):
    teacher = model_of(2)
    batch = batch_of(LENGTHS)
    config = DistillationConfig(temperature=2.0)
    assert float(kd_of(copy.deepcopy(teacher), teacher, batch, config, tmp_path).total.detach()) == pytest.approx(
        0, abs=1e-5
    )
    student = model_of(1)
    seen = {}

    def keep(module, args, outputs):
        outputs["start_logits"].retain_grad()
        seen["start"] = outputs["start_logits"]

    student.register_forward_hook(keep)
    kd_of(student, teacher, batch, config, tmp_path).total.backward()
    gradient = seen["start"].grad
    assert gradient[batch["attention_mask"] == 0].abs().max() == 0
    assert gradient[batch["attention_mask"] == 1].abs().min() > 0


def test_gradient_accumulation_does_not_change_the_step(tmp_path):
    trained = []
    for size in (4, 1):
        student = model_of(1)
        # the heads of Transformers take padding for wrong places, so that their own loss depends on it
        match = {"loss": "hidden_mse", "student": 3, "teacher": 3}
        config = DistillationConfig(temperature=2.0, label_weight=0.0, matches=(match,))
        trainer_of(
            student, model_of(2), config, folder=str(tmp_path),
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        ).train()  # fmt: skip
        trained.append(student.state_dict())
    before = model_of(1).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in trained[0].items())
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


def test_a_student_is_pruned_quantized_and_distilled_in_one_run(tmp_path):
    student = model_of(1)
    trainer = trainer_of(
        student, model_of(2), None, CompressionTrainer, str(tmp_path), max_steps=4,
        pruning=PruningConfig(target=Target(sparsity=0.5), labels="given"), quantization=QuantizationConfig(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = BertForQuestionAnswering.from_pretrained(tmp_path / "saved")
    batch = {name: batch_of(LENGTHS)[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).end_logits, trainer.student(**batch).end_logits)


def test_the_objective_of_pruning_is_the_loss_of_the_model():
    model, batch = model_of(1), batch_of(LENGTHS)
    found = label_objective(model, model(**{k: v for k, v in batch.items() if "positions" not in k}), batch)
    torch.testing.assert_close(found.loss.mean(), model(**batch).loss)


def test_sampled_ends_do_not_depend_on_padding():
    model, batch = model_of(1), batch_of(LENGTHS)
    names = ("input_ids", "attention_mask")
    together = own_objectives(model, model(**{n: batch[n] for n in names}), batch, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for i, n in enumerate(LENGTHS):
        one = {name: batch[name][i : i + 1, :n] for name in names}
        alone = own_objectives(model, model(**one), one, generator)
        torch.testing.assert_close(alone[0].loss[0], together[0].loss[i], rtol=1e-4, atol=1e-5)
    # the mean over many draws is the entropy
    outputs = {name: values[:1, : LENGTHS[0]] for name, values in model(**{n: batch[n] for n in names}).items()}
    one = {name: batch[name][:1, : LENGTHS[0]] for name in names}
    drawn = [own_objectives(model, outputs, one, generator)[0].loss.item() for _ in range(2000)]
    ends = [outputs[name][0].log_softmax(-1) for name in ("start_logits", "end_logits")]
    entropy = sum(-(end.exp() * end).sum().item() for end in ends) / 2
    assert sum(drawn) / len(drawn) == pytest.approx(entropy, rel=0.1)


def test_what_does_not_fit_spans_is_refused(tmp_path):
    student, teacher = model_of(1), model_of(2)
    with pytest.raises(LmcompressError, match="'mse' does not fit .*question_answering.*number differs. Use kl or"):
        trainer_of(student, teacher, DistillationConfig(loss="mse"), folder=str(tmp_path))
    with pytest.raises(LmcompressError, match="the temperature schedule flsw compares logits of a fixed number"):
        config = DistillationConfig(temperature_schedule={"kind": "flsw"})
        trainer_of(student, teacher, config, folder=str(tmp_path))
    with pytest.raises(LmcompressError, match="token_scaling weighs the tokens of a sequence"):
        trainer_of(student, teacher, DistillationConfig(token_scaling=1.0), folder=str(tmp_path))
    with pytest.raises(LmcompressError, match="head is for question_answering, the teacher's .* for token_classif"):
        trainer_of(student, model_of(2, BertForTokenClassification), folder=str(tmp_path))
