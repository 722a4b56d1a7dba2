"""Lengths against the positions of models: capped and said where nobody chose them, else refused before long work."""

from __future__ import annotations

import pytest
import torch
from tiny_recipe import RECIPE, write_task
from transformers import RobertaConfig, RobertaForCausalLM, RobertaForSequenceClassification

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import compare_latency, perplexity
from lmcompress.families.positions import UNLIMITED, positions_of
from lmcompress.recipes import load_recipe, parse_recipe, plan, run

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A recipe without a length, for rows that are longer than its model's 16 positions."""
    folder = write_task(tmp_path_factory.mktemp("long") / "task")
    for split in ("train", "validation"):
        lines = (folder / f"{split}.csv").read_text().splitlines()
        longer = [line.replace("film", "film " * 12) for line in lines[1:]]
        (folder / f"{split}.csv").write_text("\n".join([lines[0], *longer]) + "\n")
    text = (
        RECIPE.replace("DATA", str(folder)).replace("  max_length: 12\n", "").replace("positions: 32", "positions: 16")
    )
    return text.replace("latency_batches: [1]", "latency_batches: [1], splits: [validation]")


def test_a_length_that_nobody_chose_is_capped_and_said(texts, tmp_path, console):
    recipe = parse_recipe(texts, ["stages.student.control=false"])
    result = run(recipe, tmp_path / "run", console=console)
    said = console.file.getvalue()
    assert said.index("note: max_length is 16, the number of positions of the model (the default is 128)") < said.index(
        "1/2"
    )
    assert any("max_length is 16, the number of positions of" in note for note in result.report["notes"])
    assert any("truncated to 16 tokens" in note for note in result.report["notes"])
    # the recipe in the folder can be run again
    again = load_recipe(result.folder / "recipe.yaml")
    assert again.task.max_length == 16
    assert {entry["sequence_length"] for row in result.report["rows"] for entry in row["latency"]} == {16}


def test_a_length_that_was_chosen_is_refused(texts):
    with pytest.raises(
        LmcompressError, match="max_length must be at most 16, the number of positions of the model, got 20"
    ):
        plan(parse_recipe(texts, ["task.max_length=20"]))


def test_the_length_of_a_latency_target_is_refused_before_it_is_measured(texts):
    pruning = "{target: {latency_share: 0.5}, latency: {length: 64}}"
    with pytest.raises(LmcompressError, match=r"pruning.latency.length must be at most 16.*got 64"):
        plan(parse_recipe(texts, [f"stages.teacher.pruning={pruning}"]), measure=True)


def test_the_length_that_latency_is_measured_at_is_refused(texts):
    with pytest.raises(LmcompressError, match=r"evaluation.sequence_length must be at most 16.*got 17"):
        plan(parse_recipe(texts, ["evaluation.sequence_length=17"]))


def test_a_stride_beyond_the_length_is_refused_before_training(texts):
    with pytest.raises(LmcompressError, match=r"evaluation.stride must be at most max_length = 16, got 17"):
        plan(parse_recipe(texts, ["evaluation.stride=17"]))


def test_roberta_has_two_positions_fewer_than_rows_in_its_table():
    config = RobertaConfig(**SMALL, max_position_embeddings=18, pad_token_id=1)
    assert positions_of(config) == 16
    model = RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, 16), 5))
    with pytest.raises(LmcompressError, match="'a' has 16 positions, 17 are needed"):
        compare_latency({"a": model}, batch_sizes=[1], sequence_length=17, repeats=3)


def test_perplexity_of_a_roberta_has_windows_that_it_can_read():
    config = RobertaConfig(**SMALL, max_position_embeddings=18, pad_token_id=1, is_decoder=True)
    model = RobertaForCausalLM(config).eval()

    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    found = perplexity(model, Tokenizer(), [5 + i % 30 for i in range(40)], progress=False)
    assert found.window_tokens == (15, 15, 7)
    with pytest.raises(LmcompressError, match="at most the model's 16 positions, got 17"):
        perplexity(model, Tokenizer(), [5] * 40, max_length=17, progress=False)


def test_a_model_without_a_table_has_no_limit():
    class Config:
        model_type = "t5"

    assert positions_of(Config()) == UNLIMITED
