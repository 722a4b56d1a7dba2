"""card: what the Hub reads can be read, and says nothing about the author's machine."""

import pytest
from families import make
from huggingface_hub import ModelCard

from lmcompress import CompressedModel
from lmcompress.checkpoint.card import model_card
from lmcompress.checkpoint.schema import Provenance


def _report(base_model="", **more):
    provenance = Provenance(base_model=base_model, methods=("distillation", "pruning"), recipe="sst2")
    equivalence = {"max_error": 0.0, "relative_error": 0.0, "batches": 2, "inputs": "random"}
    model = CompressedModel(make("bert"), provenance).report()
    return {"model": model, "equivalence": equivalence, "format": "native"} | more


def test_the_metadata_are_what_the_hub_parses():
    card = ModelCard(model_card(_report("google-bert/bert-base-uncased")))
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["lmcompress", "model-compression"]


@pytest.mark.parametrize("base", ["bert-base-uncased", "org/model-1.5_b"])
def test_a_model_of_the_hub_is_the_base_model(base):
    assert ModelCard(model_card(_report(base))).data.base_model == base


@pytest.mark.parametrize(
    "base", ["", "/home/me/model", "./teacher", "../x", "runs/sst2/model", "~/model", r"C:\models\x", "a b"]
)
def test_a_path_is_no_base_model(base):
    assert ModelCard(model_card(_report(base))).data.base_model is None


def test_a_folder_that_exists_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    assert ModelCard(model_card(_report("runs/teacher"))).data.base_model is None


@pytest.mark.parametrize("base", ["/home/me/secret/model", "./teacher", r"C:\models\x"])
def test_no_path_of_the_authors_machine_is_published(base):
    assert base not in model_card(_report(base))


@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("native", "import lmcompress  # pip install lmcompress"),
        ("vanilla", "from transformers import AutoModel"),
        ("self_loading", "trust_remote_code=True"),
    ],
)
def test_the_card_says_how_this_format_loads(format, says):
    text = model_card(_report(format=format))
    assert says in text and ("pip install lmcompress" in text) == (format == "native")


def test_the_card_shows_shapes_equivalence_table_and_notes():
    table = [{"model": "teacher", "accuracy": 0.91}, {"model": "student", "accuracy": 0.9}]
    text = model_card(
        _report(table=table, task="sst2", notes=["CoLA is hard"], machine={"processor": "x86", "cores": 2, "gpu": None})
    )
    for part in (
        "4, 4, 4 (of 4 each)",
        "24, 24, 24",
        "| model | accuracy |\n|---|---|\n| teacher | 0.91 |\n| student | 0.9 |",
    ):
        assert part in text
    for part in (
        "Task: sst2.",
        "- CoLA is hard",
        "x86, 2 cores.",
        "2 batches of random token ids",
        "Made by distillation, pruning.",
    ):
        assert part in text
