"""The built-in recipes work: planned on small stand-ins for the models and data that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from lmcompress.data import train_tokenizer
from lmcompress.recipes import builtin_recipes, load_recipe, plan
from lmcompress.trainers import CompressionTrainer

# stand-ins have narrow embeddings
OVERRIDES = {"albert-sharing": ["stages.student.compact.0.rank=16"]}
PRETRAINED = [name for name in builtin_recipes() if isinstance(load_recipe(name).model, str)]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    monkeypatch.setattr(CompressionTrainer, "train", lambda *_: pytest.fail("a plan must not train"))


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory, task_folder):
    """A BERT and a GPT-2 of twelve narrow blocks that know nothing, and texts for the latter."""
    folder = tmp_path_factory.mktemp("stand-ins")
    texts = [f"a {word} film of the year {number}" for number in range(80) for word in ("dull", "bright", "poor")]
    sizes = dict(num_hidden_layers=12, num_attention_heads=12, hidden_size=48, intermediate_size=96)
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=160)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder / "bert")
    BertForMaskedLM(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder / "bert")
    tokenizer = train_tokenizer(texts, kind="bytelevel_bpe", vocab_size=400)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder / "gpt2")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = GPT2Config(n_layer=12, n_head=12, n_embd=48, vocab_size=len(tokenizer), **ids)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    (folder / "texts").mkdir()
    for split in ("train", "validation"):
        (folder / "texts" / f"{split}.txt").write_text("\n".join(texts * 8))
    return folder, task_folder


def test_the_table_of_recipes_has_every_file_with_its_paper_data_and_command():
    folder = Path(__file__).resolve().parents[2] / "recipes"
    rows = [line for line in (folder / "README.md").read_text("utf-8").splitlines() if line.startswith("| [")]
    assert len(rows) == len(builtin_recipes())
    for file in folder.glob("*/*.yaml"):
        recipe = load_recipe(file)
        (row,) = [row for row in rows if row.startswith(f"| [{file.stem}]({file.parent.name}/{file.name}) |")]
        assert f"| {recipe.task.name} | `lmcompress run {recipe.name}` |" in row
        assert set(re.findall(r"https://[^\s,;)]+", recipe.paper)) == set(re.findall(r"\((https://[^)]+)\)", row))


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_recipe_for_pretrained_models_can_be_planned(name, stand_ins, tmp_path):
    folder, task = stand_ins
    causal = load_recipe(name).model == "gpt2"
    model, rows = (folder / "gpt2", folder / "texts") if causal else (folder / "bert", task)
    # few rows need many epochs for the steps that schedules want; and they have one validation set
    overrides = ["training.num_train_epochs=60", "evaluation.splits=[validation]", *OVERRIDES.get(name, [])]
    planned = plan(load_recipe(name, [f"model={model}", f"task.name={rows}", *overrides]), tmp_path)
    assert len(planned.stages) >= len(planned.recipe.stages)
    for entry in planned.stages:
        if "pruning" in entry.plans and entry.plans["pruning"].note is None:
            dense = next(p for p in planned.stages if p.stage.name == entry.stage.start)
            assert entry.parameters < dense.parameters
        if "compact" in entry.plans:
            before, after = (
                entry.plans["compact"].reports[0].parameters[0],
                entry.plans["compact"].reports[-1].parameters[1],
            )
            assert entry.parameters == after < 0.7 * before
    assert planned.recipe.paper


def test_a_student_of_six_layers_of_a_model_of_six_is_named(stand_ins, tmp_path):
    folder, task = stand_ins
    AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(tmp_path / "six")
    config = BertConfig.from_pretrained(folder / "bert", num_hidden_layers=6)
    BertForMaskedLM(config).save_pretrained(tmp_path / "six")
    overrides = [f"task.name={task}", "training.num_train_epochs=1"]

    def notes(model, *more):
        planned = plan(load_recipe("distil-glue", [f"model={model}", *overrides, *more]), tmp_path / "run")
        return [note for note in planned.notes if "is not smaller than its teacher" in note]

    (said,) = notes(tmp_path / "six")
    assert said.startswith("student is not smaller than its teacher teacher:") and "6 blocks of width 48" in said
    assert said.endswith("stages.student.student.layers=3")
    assert not notes(tmp_path / "six", "stages.student.student.layers=3") and not notes(folder / "bert")


def test_the_vocabulary_recipe_only_takes_rows(stand_ins, tmp_path):
    folder, task = stand_ins
    overrides = [f"model={folder / 'bert'}", f"task.name={task}"]
    whole, small, after = plan(load_recipe("vocabulary", overrides), tmp_path).stages
    gone = small.plans["vocabulary"].rows_before - small.plans["vocabulary"].rows_after
    assert small.parameters == after.parameters == whole.parameters - 48 * gone
    assert small.vanilla_obstacle is None and small.plans["vocabulary"].texts_changed == 0


def test_the_quickstart_of_pruning_has_all_its_ways(tmp_path):
    planned = plan(load_recipe("quickstart-prune", ["task.limit=400"]), tmp_path)
    assert [entry.role for entry in planned.stages] == ["teacher", "pruned", "student", "control"]
    dense, one_shot, iterative, control = planned.stages
    assert dense.plans["vocabulary"].rows_after < dense.plans["vocabulary"].rows_before
    assert one_shot.steps == 0 and control.plans["pruning"].config == iterative.plans["pruning"].config
    assert one_shot.parameters < dense.parameters
