"""Whether a model looks ahead is read from the model: a BERT with ``is_decoder=True`` does not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import BY_NAME, inputs, make
from training import tiny_arguments

from lmcompress import CompressedModel, LmcompressError
from lmcompress.activations.capture import Capture
from lmcompress.distillation import Distillation, DistillationConfig, Match
from lmcompress.families import anatomy_of
from lmcompress.method import Step
from lmcompress.pruning.structured.scoring import score
from lmcompress.students import by_layers, separate
from lmcompress.trainers import CompressionTrainer, DistillationTrainer
from lmcompress.trainers.counting import count_vector, reading_of

DECODERS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM", "electra": "ElectraForCausalLM"}


def decoder(name: str, head: str = "", seed: int = 0, **config):
    """A decoder of a family of encoders, with weights large enough to matter."""
    torch.manual_seed(seed)
    settings = BY_NAME[name].make_config(is_decoder=True, initializer_range=0.3, **config)
    made = getattr(transformers, head or DECODERS[name])(settings).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


@pytest.mark.parametrize("name", DECODERS)
def test_captured_probabilities_are_the_models(name):
    model = decoder(name)
    model.set_attn_implementation("eager")
    batch = inputs(model)
    with Capture(model, [("probabilities", 2)]) as capture, torch.no_grad():
        right = model(**batch, output_attentions=True).attentions[1]
        found = capture.take()["probabilities", 2]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.transpose(1, 2)[real], right.transpose(1, 2)[real], rtol=1e-5, atol=1e-6)
    assert anatomy_of(model).causal and not anatomy_of(make(name)).causal


@pytest.mark.parametrize("name", [*DECODERS, "gpt2"])
def test_a_causal_model_is_said_to_be_one_if_it_does_not_look_ahead(name):
    others = [] if name == "gpt2" else [decoder(name, f"{BY_NAME[name].prefix}Model")]
    for model in (make(name, "base"), *others):
        ids = torch.randint(2, 60, (1, 6))
        other = ids.clone()
        other[0, -1] = (ids[0, -1] + 1) % 60
        with torch.no_grad():
            blind = torch.allclose(model(ids)[0][0, :-1], model(other)[0][0, :-1], atol=1e-6)
        assert blind == anatomy_of(model).causal


@pytest.mark.parametrize("name", DECODERS)
def test_units_are_counted_as_the_model_reads(name):
    batch = inputs(make(name))
    lengths = batch["attention_mask"].sum(1)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    _, labels, _, pairs = count_vector(batch, *reading_of(decoder(name))).tolist()
    assert labels == (lengths - 1).sum() and pairs == (lengths * (lengths + 1) // 2).sum()
    _, labels, _, pairs = count_vector(batch, *reading_of(make(name, "language"))).tolist()
    assert labels == lengths.sum() and pairs == (lengths * lengths).sum()


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_compared_where_they_predict(name, labels):
    student, teacher = decoder(name), decoder(name, seed=1)
    batch = inputs(student)
    step_inputs = dict(batch)
    if labels:
        step_inputs["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    method = Distillation(DistillationConfig(temperature=1.0), teacher)
    method.attach(student, torch.device("cpu"), nullcontext)
    made = method.loss_terms(Step(student, step_inputs, batch, 0.0, outputs=student(**batch)))
    method.release()
    with torch.no_grad():
        mine, theirs = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    counted = batch["attention_mask"][:, 1:].bool()
    expected = F.kl_div(mine[counted], theirs[counted], log_target=True, reduction="sum")
    torch.testing.assert_close(made["kd"].total.detach(), expected, rtol=1e-4, atol=1e-5)
    assert made["kd"].unit == "labels"


def test_a_decoder_is_distilled_and_does_not_depend_on_its_micro_batches(tmp_path):
    matches = (Match(loss="attention_ce", student=2, teacher=3, on="probabilities"),)
    matches += (Match(loss="attention_mse", student=2, teacher=3, on="scores"),)
    rows = [{k: v[i] for k, v in inputs(make("bert"), rows=8).items()} for i in range(8)]
    rows = [row | {"labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)} for row in rows]
    logs = []
    for size in (8, 2):
        trainer = DistillationTrainer(
            by_layers(decoder("bert", seed=1), 2).model,
            args=tiny_arguments(
                tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
            ),
            teacher=decoder("bert", seed=1),
            distillation=DistillationConfig(matches=matches),
            train_dataset=rows,
        )
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss_")})
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and set(logs[0]) > {"loss_label", "loss_kd"}


def test_the_loss_on_labels_is_the_models_own(tmp_path):
    model = decoder("bert")
    batch = inputs(model, rows=4)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    with torch.no_grad():
        right = float(model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)
    trainer = CompressionTrainer(
        model, args=tiny_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4), train_dataset=rows
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_label"] == pytest.approx(right, rel=1e-5)


def test_scores_of_heads_read_causal_attention():
    model = decoder("bert")
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 60, (2, 7))
    found = score(model, "attention_entropy", ["heads"], [{"input_ids": ids}])
    with torch.no_grad():
        p = model(ids, output_attentions=True).attentions[0].double()
    # the first query sees one key, and is not counted
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)[:, :, 1:] / torch.arange(2, 8).log()
    torch.testing.assert_close(found.heads[0].double(), 1 - entropy.mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_local_mixing_of_a_decoder_does_not_look_ahead(tmp_path):
    model = decoder("bert")
    separate(model, [0, 1, 2], 2, [inputs(model)], ridge=0.1)
    ids = torch.randint(2, 60, (1, 6))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 60
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, :-1], model(other).logits[0, :-1])
    assert CompressedModel(model).save_pretrained(tmp_path / "mixing").max_error == 0


def test_attention_of_a_decoder_and_an_encoder_is_not_compared():
    match = Match(loss="attention_ce", student=1, teacher=1, on="probabilities")
    method = Distillation(DistillationConfig(weight=0, matches=(match,)), make("bert", "language"))
    with pytest.raises(LmcompressError, match="one looks ahead and the other does not"):
        method.attach(decoder("bert"), torch.device("cpu"), nullcontext)
