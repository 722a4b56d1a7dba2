"""Recipes for causal models: conversations, a teacher with another tokenizer, the student's own texts, packing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from two_tokenizers import TEXTS, language_model, tokenizer_of

from lmcompress.errors import LmcompressError
from lmcompress.recipes import parse_recipe, plan, run

RECIPE = """\
name: talk
model: STUDENT
task: {name: talk, data: TALK, chat: true, max_length: 40}
stages:
  - name: student
    distillation: {teachers: [TEACHER], loss: uld, temperature: 1}
    training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1e-3, save_strategy: "no", logging_steps: 1}
evaluation: {repeats: 3, latency_batches: []}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two models with tokenizers of their own, conversations and texts."""
    folder = tmp_path_factory.mktemp("models")
    for name, size in (("mine", 300), ("theirs", 270)):
        tokenizer = tokenizer_of(size)
        tokenizer.save_pretrained(folder / name)
        language_model(tokenizer).save_pretrained(folder / name)
    pairs = zip(TEXTS, reversed(TEXTS), strict=True)
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]} for one, two in pairs
    ]
    for kind in ("talk", "texts"):
        (folder / kind).mkdir()
    for split in ("train", "validation"):
        (folder / "talk" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        (folder / "texts" / f"{split}.txt").write_text("\n".join(TEXTS * 4))
    return folder


def recipe(folders: Path, *overrides: str, teacher: str = "theirs"):
    text = RECIPE.replace("STUDENT", str(folders / "mine")).replace("TEACHER", str(folders / teacher))
    return parse_recipe(text.replace("TALK", str(folders / "talk")), overrides)


def test_conversations_are_distilled_from_a_teacher_with_another_tokenizer(folders, tmp_path, console):
    result = run(recipe(folders), tmp_path / "run", console=console)
    last = result.report["rows"][-1]["training"]["last_log"]
    assert 0 < last["loss_kd"] <= 2 and last["loss_label"] > 0
    by_name = {row["name"]: row["metrics"]["validation"] for row in result.report["rows"]}
    # an untrained model is about as sure as chance of the answers
    assert all(10 < metrics["token_perplexity"] < 3000 for metrics in by_name.values())


def test_the_student_writes_its_own_texts_in_a_recipe(folders, tmp_path, console):
    own = "stages.student.distillation.on_policy={fraction: 1.0, max_new_tokens: 5}"
    loss = "stages.student.distillation.loss=jsd"
    result = run(recipe(folders, own, loss, teacher="mine"), tmp_path / "run", console=console)
    last = result.report["rows"][-1]["training"]["last_log"]
    # the student is its own teacher
    assert "loss_label" not in last and last["loss_kd"] == pytest.approx(0, abs=1e-5)


def test_what_does_not_go_together_is_refused_before_training(folders):
    with pytest.raises(
        LmcompressError, match="compare two vocabularies with distillation.loss: uld or distillation.shared"
    ):
        plan(recipe(folders, "stages.student.distillation.loss=kl"))
    with pytest.raises(LmcompressError, match="only for the training rows: leave store out"):
        recipe(folders, "stages.student.distillation.store={}")
    with pytest.raises(LmcompressError, match="matches: features are compared at equal positions"):
        plan(recipe(folders, "stages.student.distillation.matches=[{loss: hidden_mse, student: 1, teacher: 1}]"))
    with pytest.raises(LmcompressError, match="vocabulary is chosen from texts, the rows are conversations"):
        plan(recipe(folders, "stages.student.vocabulary={}"))
    with pytest.raises(LmcompressError, match="packing='apart' packs documents of running text"):
        plan(recipe(folders, "task.packing=apart", teacher="mine"))
    assert plan(
        recipe(
            folders, "stages.student.distillation={teachers: [%s], shared_tokens: renormalized}" % (folders / "theirs")
        )
    )


def test_documents_are_packed_apart_for_families_that_keep_them_apart(folders, monkeypatch):
    texts = [f"task={{name: texts, data: {folders / 'texts'}, packing: apart, max_length: 8}}"]
    planned = plan(recipe(folders, *texts, "stages.student.distillation.loss=kl", teacher="mine"))
    assert "position_ids" in planned.materials.rows().train.column_names
    family = "lmcompress.families.base.Anatomy.packs"
    monkeypatch.setattr(family, False)
    with pytest.raises(
        LmcompressError, match="needs models that keep packed documents apart .* gpt2 attends to the whole"
    ):
        plan(recipe(folders, *texts, "stages.student.distillation.loss=kl", teacher="mine"))
