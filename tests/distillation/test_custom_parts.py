"""Losses, matches and schedules of one's own: as objects, and by module and attribute."""

import sys

import pytest
import torch
from families import make
from torch.nn import functional as F
from transformers import TrainingArguments

from lmcompress import LmcompressError
from lmcompress.distillation import DistillationConfig, LogitLoss, Match, MatchLoss
from lmcompress.trainers import DistillationTrainer

MODULE = """
import torch
from lmcompress.distillation import LogitLoss, MatchLoss

def squared(student_logits, teacher_logits, *, temperature, scale_by_temperature):
    p, q = (torch.softmax(z / temperature, dim=-1) for z in (teacher_logits, student_logits))
    return (p - q).square().sum(dim=-1)

def lengths(student, teacher, mask):
    return ((student.norm(dim=-1) - teacher.norm(dim=-1)).square() * mask).sum(dim=-1)

brier = LogitLoss("brier", squared)
norms = MatchLoss("norms", lengths, "tokens", features=("hidden",))
late = lambda progress: float(progress > 0.5)
nothing = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_parts", None)


def trained(tmp_path, config, family="bert", steps=1):
    head = "language" if family == "gpt2" else "classification"
    student, teacher = make(family, head, seed=1), make(family, head, seed=2)
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=0.1,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(3, 9), "attention_mask": torch.ones(6, dtype=torch.long)} for _ in range(4)]
    rows = [row | {"labels": row["input_ids"] if family == "gpt2" else torch.tensor(1)} for row in rows]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = DistillationTrainer(student, args, teacher=teacher, distillation=config, train_dataset=rows)
    trainer.train()
    moved = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    return trainer.state.log_history[:-1], moved


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parts_named_by_module_and_attribute_train(own, tmp_path, family):
    config = DistillationConfig(
        loss="own_parts:brier",
        temperature=2.0,
        label_weight=0.0,
        chunk_tokens=4,
        matches=[Match(loss="own_parts:norms", student=1, teacher=2, weight_schedule="own_parts:late")],
    )
    logs, moved = trained(tmp_path, config, family, steps=3)
    assert all(0 < log["loss_kd"] < 2 and log["loss_norms_0"] > 0 for log in logs) and moved
    assert DistillationConfig.model_validate_json(config.model_dump_json()) == config


def test_the_vocabulary_in_chunks_gives_the_value_of_the_custom_loss(tmp_path):
    def halved(student, teacher, *, temperature, scale_by_temperature):
        return F.mse_loss(student, teacher, reduction="none").mean(-1) / 2

    values = []
    for loss in (LogitLoss("halved", halved), "mse"):
        config = DistillationConfig(loss=loss, label_weight=0.0, chunk_tokens=3)
        values.append(trained(tmp_path, config, "gpt2")[0][0]["loss_kd"])
    assert values[0] == pytest.approx(values[1] / 2)


def test_objects_train_without_having_a_name(tmp_path):
    def absolute(student, teacher, mask, *, causal, power=1.0):
        pairs = mask[:, None, :, None] * mask[:, None, None, :]
        return ((student - teacher).abs().pow(power) * pairs).mean(1).sum((1, 2))

    own = MatchLoss("absolute", absolute, "pairs", features=("scores", "probabilities"))
    matches = [Match(loss=own, on="scores", student=1, teacher=1, options={"power": 1.5})]
    logs, moved = trained(tmp_path, DistillationConfig(weight=0.0, label_weight=0.0, matches=matches))
    assert logs[0]["loss_absolute_0"] > 0 and any("query" in name for name in moved)
    with pytest.raises(Exception, match="has no name to save"):
        matches[0].model_dump_json()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "own_parts:missing"}, "own_parts has no 'missing'"),
        ({"loss": "own_partz:brier"}, "cannot import 'own_partz'"),
        ({"loss": "own_parts:norms"}, "must be a lmcompress.distillation.LogitLoss, got MatchLoss"),
        ({"loss": "klx"}, "unknown logit loss 'klx'; did you mean 'kl'"),
        ({"weight_schedule": "own_parts:nothing"}, "must be a function of the share of training done, got int"),
        ({"matches": [{"loss": "hidden_mes", "student": 1, "teacher": 1}]}, "unknown match.*did you mean 'hidden_mse'"),
        ({"matches": [{"loss": "own_parts:brier", "student": 1, "teacher": 1}]}, "MatchLoss, got LogitLoss"),
    ],
)
def test_parts_that_are_none_are_refused_by_the_configuration(own, changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**changes)


def _reduced(student, teacher, *, temperature, scale_by_temperature):
    return F.mse_loss(student, teacher)


def _detached(student, teacher, *, temperature, scale_by_temperature):
    return (student.detach() - teacher).square().mean(-1)


def _infinite(student, teacher, **_):
    return (student - teacher).square().sum(-1) / 0


def _without_keywords(student, teacher):
    return (student - teacher).square().mean(-1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "function, message",
    [
        (_reduced, r"one float32 value per row.*got torch.float32 \(\)"),
        (_detached, "with a gradient to the student.*do not detach"),
        (_infinite, r"'_infinite' must be finite, got \[inf, inf\]"),
        (_without_keywords, "'_without_keywords' fails on two rows.*unexpected keyword argument 'temperature'"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_before(tmp_path, family, function, message):
    with pytest.raises(LmcompressError, match=message):
        trained(tmp_path, DistillationConfig(loss=LogitLoss(function.__name__, function)), family)


def test_a_loss_for_other_heads_is_refused_before(tmp_path):
    own = LogitLoss("own", _without_keywords, problems=("regression",))
    with pytest.raises(LmcompressError, match="does not fit.*Use kl or ce or reverse_kl or jsd or mse"):
        trained(tmp_path, DistillationConfig(loss=own))


def test_a_match_that_gives_one_number_for_the_batch_is_refused_before(tmp_path):
    own = MatchLoss("whole", lambda student, teacher, mask: (student - teacher).sum(), "tokens", features=("hidden",))
    with pytest.raises(LmcompressError, match=r"whole_0 \(student layer 1, .*must give the sum of each"):
        trained(tmp_path, DistillationConfig(matches=[Match(loss=own, student=1, teacher=2)]))
