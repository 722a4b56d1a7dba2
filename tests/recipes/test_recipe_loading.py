"""YAML to recipes: lines, nearest names, overrides, and nothing executed."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_recipe import RECIPE

from lmcompress.errors import LmcompressError
from lmcompress.recipes import builtin_recipes, dump_recipe, load_recipe, parse_recipe, recipe_schema

_TEN = ", ".join(["*{}"] * 10)
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{_TEN.replace('{}', before)}]" for before, name in ("ab", "bc", "cd", "de")
)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("hidden_size: 16", "hidden_sze: 16", r"line 4: model\.hidden_sze: unknown key; did you mean 'hidden_size'"),
        ("max_length: 12", "max_lenght: 12", r"line 11: task\.max_lenght: unknown key; did you mean 'max_length'"),
        ("  max_length: 12", "  max_length: long", r"line 11: task\.max_length: .*integer.*got \"long\""),
        (
            "learning_rate: 1e-3}\n  - name: student",
            "learning_rte: 1}\n  - name: student",
            r"line 14: .*learning_rte: unknown key; did you mean 'learning_rate'",
        ),
        (
            "teachers: [teacher]",
            "teachrs: [teacher]",
            r"line 19: .*distillation\.teachrs: unknown key; did you mean 'teachers'",
        ),
        ("on: scores", "om: scores", r"line 21: .*losses\.1\.om: unknown key\. Valid are: loss, on"),
        (
            "start: teacher",
            "start: techer",
            r"line 16: stages\.student\.start: 'techer' is no earlier stage; did you mean 'teacher'",
        ),
        ("teachers: [teacher]", "teachers: [student]", r"line 19: .*teachers\.0: 'student' is no earlier stage"),
        ("family: bert", "family: brt", r"line 3: model\.family: no model family 'brt'; did you mean 'bert'"),
        ("{layers: 2}", "{layers: 2, named: T3}", r"line 17: .*exactly one of .* got layers and named"),
        ("{layers: 2}", "{named: T33}", r"line 17: .*no shape is called 'T33'; did you mean 'T3'"),
        (
            "max_steps: 4, save_s",
            "push_to_hub: true, save_s",
            r"push_to_hub cannot be set in a recipe: use lmcompress push",
        ),
        ("repeats: 3", "repeats: 1", r"line 24: evaluation\.repeats: .*greater than or equal to 3"),
        ("name: tiny", "name: ../tiny", r"line 1: name: must be letters"),
        ("- name: teacher", "- name: checkpoints", r"line 13: stages\.checkpoints\.name: must be letters.*not one of"),
        ("      layer_map: uniform\n", "", r"layer_map and losses go together"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_the_nearest_name(right, wrong, message):
    assert right in RECIPE
    with pytest.raises(LmcompressError, match=message):
        parse_recipe(RECIPE.replace(right, wrong, 1))


def test_all_problems_are_reported_at_once():
    with pytest.raises(LmcompressError, match="(?s)2 problems.*line 4.*line 11"):
        parse_recipe(RECIPE.replace("hidden_size: 16", "hidden_size: wide").replace("max_length: 12", "max_length: 0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1, 2]", "must be a mapping"),
        ("name: [a", "line 1: not valid YAML"),
        ("name: a\nname: b", "line 2: name is there twice, first on line 1"),
        ("name: !!python/object/apply:os.system [ls]", "line 1: the tag .* has no place in a recipe"),
        ("name: !env HOME", "line 1: the tag .* has no place in a recipe"),
        ("{[1]: 2}", "keys must be plain words"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than"),
        ("a: " + "[" * 5000, "not valid YAML"),
        (_BOMB, "more than 20000 values"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(text, message):
    with pytest.raises(LmcompressError, match=message):
        parse_recipe(text)


def test_yaml_scalars_mean_what_they_look_like():
    recipe = parse_recipe(RECIPE)
    assert recipe.stages[0].training.learning_rate == 1e-3
    assert recipe.stages[1].distillation.losses[1].on == "scores"
    assert parse_recipe(RECIPE, ["description=no"]).description == "no"


def test_environment_variables_are_not_expanded():
    assert parse_recipe(RECIPE.replace("DATA", "$HOME/x")).task.name == "$HOME/x"


def test_overrides_reach_stages_by_name_all_stages_and_the_top():
    recipe = parse_recipe(
        RECIPE,
        [
            "training.learning_rate=3e-4",
            "stages.student.training.max_steps=7",
            "stages.0.training.bf16=true",
            "seed=5",
            "task.limit=10",
        ],
    )
    teacher, student = recipe.stages
    assert (teacher.training.learning_rate, student.training.learning_rate) == (3e-4, 3e-4)
    assert (teacher.training.max_steps, student.training.max_steps) == (4, 7)
    assert (teacher.training.bf16, student.training.bf16, recipe.seed, recipe.task.limit) == (True, False, 5, 10)


def test_an_override_replaces_a_model_from_scratch_by_a_pretrained_one():
    assert parse_recipe(RECIPE, ["model=bert-base-uncased"]).model == "bert-base-uncased"


def test_an_override_makes_what_is_not_there():
    text = "{name: a, model: m, task: {name: t}, stages: [{name: s}]}"
    assert parse_recipe(text, ["training.max_steps=3"]).stages[0].training.max_steps == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "must look like key.path=value"),
        ("=3", "must look like key.path=value"),
        ("sed=3", "command line: sed: unknown key; did you mean 'seed'"),
        ("stages.studnt.save=vanilla", "no stage 'studnt'; did you mean 'student'"),
        (
            "training.learning_rate=fast",
            "command line: stages.teacher.training.learning_rate: input should be a valid number",
        ),
        ("task.name.x=1", "task.name is 'DATA', which has no 'x'"),
        ("training=3", "needs a field"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(LmcompressError, match=message):
        parse_recipe(RECIPE, [override])


# 08 is a number in YAML: a text must be quoted
@example(steps=1, rate=1.0, choose="uniform", description="08")
# long enough to be folded, all escapes, one space
@example(steps=1, rate=1.0, choose="uniform", description="\x1a\x1f" + "\u1234" * 18 + " " + "\x94" * 20)
@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 10**6),
    st.floats(1e-8, 1e3),
    st.sampled_from(["uniform", "first", "last", "skip"]),
    st.text(max_size=40),
)
def test_a_recipe_written_out_reads_back_the_same(steps, rate, choose, description):
    recipe = parse_recipe(
        RECIPE,
        [f"training.max_steps={steps}", f"training.learning_rate={rate!r}", f"stages.student.student.choose={choose}"],
    )
    recipe = recipe.model_copy(update={"description": description})
    assert parse_recipe(dump_recipe(recipe)) == recipe


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "model", "stages", "task", "training", "distillation", "matches", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_anything_else_than_a_recipe_gives_one_error_of_ours(document):
    with pytest.raises(LmcompressError):
        parse_recipe(json.dumps(document))


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_built_in_recipes_are_valid_and_tell_where_they_come_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and "http" in recipe.paper
    ways = ("distillation", "pruning", "vocabulary", "quantization", "sparsity", "sharing")
    assert any(getattr(stage, way) for stage in recipe.stages for way in ways)


def test_the_schema_knows_every_field_and_describes_it():
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert {"logging_first_step", "torch_compile", "learning_rate"} <= set(schema["$defs"]["Training"]["properties"])
    assert all("description" in field for field in schema["properties"].values())


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LmcompressError, match="no recipe 'quikstart'.*did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(LmcompressError, match="no such file"):
        load_recipe(tmp_path / "a.yaml")
