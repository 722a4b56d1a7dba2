"""A plan tells what a run will do, refuses what cannot work, and trains nothing."""

from __future__ import annotations

import pytest

from lmcompress.errors import LmcompressError
from lmcompress.recipes import load_recipe, parse_recipe, plan
from lmcompress.trainers import CompressionTrainer


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    monkeypatch.setattr(CompressionTrainer, "train", lambda *_: pytest.fail("a plan must not train"))


def test_a_plan_has_stages_shapes_steps_and_sizes(tiny):
    planned = plan(
        parse_recipe(tiny, ["stages.student.training.max_steps=-1", "stages.student.training.num_train_epochs=2"])
    )
    teacher, student, control = planned.stages
    assert [entry.role for entry in planned.stages] == ["teacher", "student", "control"]
    assert control.stage.name == "student-control" and "distillation" not in control.plans
    assert (control.steps, control.parameters) == (student.steps, student.parameters)
    assert teacher.steps == 4
    assert student.steps == 2 * 24 // 4
    assert student.shape == "2 blocks of width 16: 2 heads, FFN 64"
    assert student.bytes_estimate == 4 * student.parameters < teacher.bytes_estimate
    assert student.vanilla_obstacle is None
    assert planned.reference == "teacher"


@pytest.mark.parametrize(("fast", "said"), [(True, "trains in bfloat16"), (False, "trains in float32")])
def test_a_plan_says_what_bf16_auto_means_on_this_machine(tiny, monkeypatch, fast, said):
    monkeypatch.setattr("lmcompress.recipes.training.bfloat16_is_fast", lambda **_: fast)
    stages = plan(parse_recipe(tiny, ["stages.student.training.bf16=auto"])).stages
    assert [any(said in words for words in entry.words) for entry in stages] == [False, True, True]


def test_a_layer_map_is_spelled_out_for_each_loss(tiny):
    matches = plan(parse_recipe(tiny)).stages[1].plans["distillation"].matches
    assert [(m.loss, m.student, m.teacher) for m in matches] == [
        ("hidden_mse", 0, 0),
        ("hidden_mse", 1, 2),
        ("hidden_mse", 2, 4),
        ("attention_mse", 1, 2),
        ("attention_mse", 2, 4),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.student.student.layers=5", "stage 'student': .*1 to 4 layers, got 5"),
        ("stages.student.student.layers=[0, 7]", "stage 'student': layers must be numbers from 0 to 3"),
        ("stages.student.distillation.layer_map=[[1, 9]]", "stage 'student': .*9"),
        (
            "stages.student.distillation.losses=[hiden_mse]",
            r"losses\.0: unknown match 'hiden_mse'; did you mean",
        ),
        ("stages.student.distillation.losses=[attention_mse]", "stage 'student': .*on='scores'"),
        ("stages.student.distillation.matches=[{loss: hidden_mse, student: 1, teacher: 9}]", "stage 'student': .*9"),
        (
            "stages.student.distillation.matches=[{loss: hidden_mse, student: 1, teacher: 1, which: 3}]",
            "names teacher 3",
        ),
        ("stages.student.student={shape: {num_heads: 4}}", "2 heads|4 heads"),
        ("task.label_column=tone", "no column 'tone'"),
        ("task.text_columns=[sentence]", "no column 'sentence'"),
        ("task.name=/nowhere/at/all", "no such file or folder"),
        ("task.max_length=64", "max_length must be at most 32, the number of positions of the model"),
        ("evaluation.splits=[test]", "evaluation.splits: no split 'test'"),
        ("stages.student.distillation.teachers=[/nowhere]", "no such folder: /nowhere"),
        ("model=/nowhere", "no such folder: /nowhere"),
        ("model.config={hidden_drop: 0.1}", "has no such field"),
        ("stages.teacher.augmentation={operations: [replace]}", "augmentation by replace needs distillation"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tiny, override, message):
    with pytest.raises(LmcompressError, match=message):
        plan(parse_recipe(tiny, [override]))


def test_words_are_not_replaced_where_the_vocabulary_has_none(tiny):
    replaced = "stages.student.augmentation={operations: [replace]}"
    plan(parse_recipe(tiny, [replaced]))
    with pytest.raises(LmcompressError, match="has . whole words, so there is nothing to replace words by"):
        plan(parse_recipe(tiny, [replaced, "model.tokenizer.vocab_size=36"]))


def test_a_label_without_a_name_in_training_is_refused(tiny, task_folder, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text((task_folder / f"{split}.csv").read_text())
    with (tmp_path / "validation.csv").open("a") as file:
        file.write("a strange film,odd\n")
    with pytest.raises(LmcompressError, match="'odd'.*out of range"):
        plan(parse_recipe(tiny, [f"task.name={tmp_path}"]))


def test_teacher_and_student_with_different_label_maps_are_refused(tiny, make_model, tmp_path):
    outside = make_model("bert", num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    outside.save_pretrained(tmp_path)
    (tmp_path / "task").mkdir()
    with pytest.raises(LmcompressError, match="name their labels differently|tokenizer"):
        plan(
            parse_recipe(
                tiny,
                [
                    f"stages.student.distillation.teachers=[{tmp_path}]",
                    "stages.student.distillation.losses=[hidden_mse]",
                ],
            )
        )


@pytest.mark.parametrize("name", ["quickstart", "quickstart-lm"])
def test_the_quickstarts_can_be_planned_without_a_network(name):
    planned = plan(load_recipe(name, ["task.limit=200"] if name == "quickstart" else []))
    assert [entry.role for entry in planned.stages] == ["teacher", "student", "control"]
    teacher, student, control = planned.stages
    assert student.parameters == control.parameters < 0.7 * teacher.parameters
