"""model: one wrapper, and a save that either reloads to the same answers or changes nothing."""

import copy
import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from families import FFN, HEAD_SIZE, HEADS, HIDDEN, LABELS, LAYERS, auto_class, cut_unevenly, inputs, make, outputs
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BloomConfig,
    BloomModel,
    PreTrainedModel,
)

from lmcompress import CompressedModel, CompressionConfig, EquivalenceError, LmcompressError, UnknownFamilyError
from lmcompress.checkpoint.cutting import keep_heads, keep_layers, keep_neurons
from lmcompress.checkpoint.saving import outputs_of, random_batches, replaced_folder
from lmcompress.checkpoint.schema import Provenance
from lmcompress.checkpoint.structure import structure_of
from lmcompress.families import anatomy_of


def everything_in(folder):
    """Name and content of every file, hidden ones included."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def test_calls_and_attributes_pass_through(family):
    model = make(family)
    compressed = CompressedModel.wrap(model)
    assert torch.equal(outputs(compressed), outputs(model))
    assert compressed.config is model.config and compressed.num_labels == LABELS
    assert CompressedModel.wrap(compressed) is compressed
    with pytest.raises(AttributeError, match="no_such_thing"):
        compressed.no_such_thing  # noqa: B018


def test_a_wrapped_model_can_be_copied_and_pickled():
    compressed = CompressedModel(make("bert"))
    for again in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert torch.equal(outputs(again), outputs(compressed)) and again.provenance == compressed.provenance


def test_the_report_says_shapes_and_how_it_can_be_saved(family):
    model = make(family)
    report = CompressedModel(model, Provenance(base_model="x/y", methods=("pruning",))).report()
    assert json.loads(json.dumps(report)) == report
    assert report["blocks"] == [{"heads": HEADS, "ffn": FFN}] * LAYERS
    assert (report["hidden_size"], report["head_size"], report["vanilla"]) == (HIDDEN, HEAD_SIZE, True)
    assert report["parameters"] == model.num_parameters()
    assert report["provenance"]["base_model"] == "x/y"
    uneven = CompressedModel(cut_unevenly(model)).report()
    assert uneven["blocks"] == [{"heads": 2, "ffn": 12}, {"heads": 1, "ffn": 5}]
    assert not uneven["vanilla"] and "every block needs all 4 heads" in uneven["vanilla_obstacle"]


def test_the_representation_shows_class_and_shapes():
    compressed = CompressedModel(cut_unevenly(make("bert")))
    assert repr(compressed) == "CompressedModel(BertForSequenceClassification, blocks=[2×4+12, 1×4+5])"


def test_only_models_are_wrapped_and_only_those_of_known_families_have_shapes():
    with pytest.raises(LmcompressError, match="wraps a transformers PreTrainedModel, got Linear"):
        CompressedModel(torch.nn.Linear(2, 2))
    bloom = BloomModel(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    # it can be stored, and has no shapes that could be cut
    with pytest.raises(UnknownFamilyError, match="does not know the model family 'bloom'.*clustering and storage"):
        CompressedModel(bloom).structure  # noqa: B018


@pytest.mark.parametrize("head", ["base", "classification", "tokens", "language"])
def test_a_native_save_measures_no_difference_and_reloads_as_the_class_it_was(family, head, tmp_path):
    model = cut_unevenly(make(family, head))
    measured = CompressedModel(model).save_pretrained(tmp_path / "m")
    assert measured.max_error == measured.relative_error == 0.0 and measured.inputs == "random"
    reloaded = CompressedModel.from_pretrained(tmp_path / "m")
    assert type(reloaded.model) is type(model) and torch.equal(outputs(reloaded), outputs(model))
    assert reloaded.structure == structure_of(model)


def test_shapes_origins_and_provenance_survive_saving(tmp_path):
    provenance = Provenance(base_model="a/b", recipe="r", methods=("distillation",), library_version="0.1.0")
    CompressedModel(cut_unevenly(make("gpt2")), provenance).save_pretrained(tmp_path / "m")
    again = CompressedModel.from_pretrained(tmp_path / "m", AutoModelForSequenceClassification)
    assert again.provenance == provenance
    again.save_pretrained(tmp_path / "n")
    assert CompressedModel.from_pretrained(tmp_path / "n").compression == again.compression


def test_a_model_loaded_by_stock_transformers_says_itself_where_it_comes_from(tmp_path):
    provenance = Provenance(base_model="a/b", methods=("distillation",))
    CompressedModel(cut_unevenly(make("bert")), provenance).save_pretrained(tmp_path / "m")
    assert CompressedModel.wrap(AutoModel.from_pretrained(tmp_path / "m")).provenance == provenance
    assert CompressedModel(make("bert")).provenance == Provenance()


def test_saving_leaves_the_model_in_memory_as_it_was(family, tmp_path):
    for format in ("native", "vanilla", "self_loading"):
        model = make(family).train()
        before = outputs(copy.deepcopy(model).eval())
        CompressedModel(model).save_pretrained(tmp_path / format, format=format)
        assert model.training and not hasattr(model.config, "quantization_config")
        assert not getattr(model.config, "auto_map", None)
        assert torch.equal(outputs(model.eval()), before)


def test_a_reloaded_model_can_be_cut_further_and_saved_again(family, tmp_path):
    CompressedModel(cut_unevenly(make(family))).save_pretrained(tmp_path / "m")
    again = CompressedModel.from_pretrained(tmp_path / "m")
    keep_heads(again.anatomy.blocks[0], [1])
    keep_layers(again.model, [0])
    assert again.save_pretrained(tmp_path / "m").max_error == 0.0
    assert [(b.heads, b.ffn) for b in CompressedModel.from_pretrained(tmp_path / "m").structure.blocks] == [(1, 12)]


def test_a_vanilla_save_is_a_stock_checkpoint(family, tmp_path):
    model = make(family)
    for block in anatomy_of(model).blocks:
        keep_neurons(block, [3, 1, 7])
    keep_layers(model, [2, 0])
    CompressedModel(model).save_pretrained(tmp_path / "native")
    compressed = CompressedModel.from_pretrained(tmp_path / "native")
    compressed.save_pretrained(tmp_path / "vanilla", format="vanilla")
    assert "quantization_config" not in json.loads((tmp_path / "vanilla" / "config.json").read_text())
    assert compressed.model.hf_quantizer is not None
    reloaded = auto_class(family, "classification").from_pretrained(tmp_path / "vanilla")
    assert not getattr(reloaded, "is_quantized", False) and torch.equal(outputs(reloaded), outputs(model))


def test_vanilla_is_refused_with_the_reason_and_the_way_out(family, tmp_path):
    compressed = CompressedModel(cut_unevenly(make(family)))
    assert "needs all 4 heads" in compressed.why_not_vanilla()
    with pytest.raises(LmcompressError, match="no vanilla form: .* needs all 4 heads.*native or self_loading instead"):
        compressed.save_pretrained(tmp_path / "m", format="vanilla")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="native, vanilla or self_loading, got 'onnx'"):
        CompressedModel(make("bert")).save_pretrained(tmp_path / "m", format="onnx")


def test_bfloat16_is_saved_and_compared_as_such(family, tmp_path):
    model = cut_unevenly(make(family)).to(torch.bfloat16)
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0.0
    assert CompressedModel.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_a_model_for_question_answering_saves(make_model, tmp_path):
    model = BertForQuestionAnswering(make_model("bert", num_labels=2).config)
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0.0


def test_as_many_classes_as_tokens_are_no_tokens(make_model, tmp_path):
    model = make_model("bert", num_labels=20)
    batches = random_batches(model)
    assert batches[0]["input_ids"].shape == (4, 20)
    last = outputs_of(model, batches)[-1]
    assert last.shape == (4, 20) and (last != 0).all()
    CompressedModel(model).save_pretrained(tmp_path / "m")


def test_given_batches_and_more_files_are_used(tmp_path):
    model = make("bert")
    batch = inputs(model) | {"labels": torch.tensor([0, 1, 2]), "teacher_input_ids": torch.ones(3, 9)}
    measured = CompressedModel(model).save_pretrained(
        tmp_path / "m",
        batches=[batch],
        report={"task": "sst2"},
        write_more=lambda folder: (folder / "more.txt").write_text("more"),
    )
    assert measured.inputs == "given" and measured.batches == 1
    report = json.loads((tmp_path / "m" / "lmcompress.json").read_text())
    assert report["task"] == "sst2" and report["equivalence"] == vars(measured) and report["format"] == "native"
    assert (tmp_path / "m" / "more.txt").read_text() == "more"
    assert "of real inputs" in (tmp_path / "m" / "README.md").read_text()


def test_the_round_trip_check_compares_with_what_was_trained(tmp_path):
    model = make("bert")
    batches = random_batches(model)
    reference = outputs_of(model, batches)
    CompressedModel(model).save_pretrained(tmp_path / "m", batches=batches, reference=reference)
    keep_heads(anatomy_of(model).blocks[0], [0])
    with pytest.raises(
        EquivalenceError, match=r"\(native\) differs from the one in memory by .* on 2 batches; nothing was written"
    ):
        CompressedModel(model).save_pretrained(tmp_path / "n", batches=batches, reference=reference)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_the_round_trip_check_refuses_answers_of_another_shape(tmp_path):
    model = make("bert")
    reference = [torch.zeros(1, LABELS) for _ in range(2)]
    with pytest.raises(EquivalenceError, match="returns shapes"):
        CompressedModel(model).save_pretrained(tmp_path / "n", reference=reference)


@pytest.fixture
def old_checkpoint(tmp_path):
    """A checkpoint that some save is going to replace, and what was in it."""
    CompressedModel(make("bert", seed=5)).save_pretrained(tmp_path / "m")
    return tmp_path / "m", everything_in(tmp_path)


@pytest.mark.parametrize("format", ["native", "vanilla", "self_loading"])
def test_a_reload_that_answers_differently_leaves_the_old_checkpoint(old_checkpoint, monkeypatch, format):
    folder, before = old_checkpoint
    stock = PreTrainedModel.from_pretrained.__func__

    def spoilt(cls, *args, **kwargs):
        model = stock(cls, *args, **kwargs)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] += 1.0
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spoilt))
    with pytest.raises(EquivalenceError, match="differs from the one in memory"):
        CompressedModel(make("bert")).save_pretrained(folder, format=format)
    assert everything_in(folder.parent) == before
    with pytest.raises(EquivalenceError):
        CompressedModel(make("bert")).save_pretrained(folder.parent / "new" / "deep", format=format)
    assert not (folder.parent / "new" / "deep").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["everywhere", "in the last batch"])
def test_answers_that_are_no_numbers_are_refused(tmp_path, bad, where):
    model = make("bert")
    batches = random_batches(model)
    rare = 63
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == rare] = 5
    if where == "everywhere":
        model.classifier.bias.data[0] = bad
    else:
        batches[-1]["input_ids"][0, 0] = rare
        model.get_input_embeddings().weight.data[rare] = bad
    with pytest.raises(EquivalenceError, match="If the model returns NaN, training diverged"):
        CompressedModel(model).save_pretrained(tmp_path / "m", batches=batches)
    assert list(tmp_path.iterdir()) == []


class _SafetensorError(Exception):
    """As safetensors reports it."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        _SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
@pytest.mark.parametrize("moment", ["weights", "config", "report"])
def test_a_full_disk_in_the_middle_of_saving_leaves_the_old_checkpoint(old_checkpoint, monkeypatch, error, moment):
    folder, before = old_checkpoint
    if moment == "report":
        monkeypatch.setattr("lmcompress.model.model_card", lambda report: (_ for _ in ()).throw(error))
    else:
        stock = PreTrainedModel.save_pretrained

        def full(self, target, **kwargs):
            if moment == "weights":
                (Path(target) / "model.safetensors").write_bytes(b"half of it")
            else:
                stock(self, target, **kwargs)
            raise error

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(
        LmcompressError, match="could not write .*No space left.*Nothing was changed there; free some space"
    ):
        CompressedModel(make("bert")).save_pretrained(folder)
    assert everything_in(folder.parent) == before
    assert [f.name for f in folder.parent.iterdir()] == ["m"]


def test_a_failed_exchange_of_folders_puts_the_old_one_back(old_checkpoint, monkeypatch):
    folder, before = old_checkpoint
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("lmcompress.checkpoint.saving.os.replace", second_fails)
    with pytest.raises(LmcompressError, match="could not write .*Input/output error"):
        CompressedModel(make("bert")).save_pretrained(folder)
    assert everything_in(folder.parent) == before


def test_an_interruption_leaves_the_old_checkpoint(old_checkpoint):
    folder, before = old_checkpoint
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert everything_in(folder.parent) == before


def test_a_save_replaces_the_old_checkpoint_as_a_whole(old_checkpoint):
    folder, _ = old_checkpoint
    (folder / "stale.txt").write_text("of the old model")
    model = make("bert", seed=9)
    CompressedModel(model).save_pretrained(folder)
    assert not (folder / "stale.txt").exists() and [f.name for f in folder.parent.iterdir()] == ["m"]
    assert torch.equal(outputs(CompressedModel.from_pretrained(folder)), outputs(model))


def test_a_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(LmcompressError, match="m is a file; a checkpoint is a folder"):
        CompressedModel(make("bert")).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LmcompressError, match="holds files but no config.json, and would be replaced as a whole"):
        CompressedModel(make("bert")).save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_and_a_new_one_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new/deep"):
        CompressedModel(make("bert")).save_pretrained(str(tmp_path / folder))
        assert (tmp_path / folder / "config.json").is_file()


def test_a_link_to_a_checkpoint_stays_a_link(old_checkpoint):
    folder, _ = old_checkpoint
    (folder.parent / "latest").symlink_to(folder, target_is_directory=True)
    model = make("bert", seed=9)
    CompressedModel(model).save_pretrained(folder.parent / "latest")
    assert (folder.parent / "latest").is_symlink()
    assert torch.equal(outputs(CompressedModel.from_pretrained(folder)), outputs(model))


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LmcompressError, match="cannot write to"):
        CompressedModel(make("bert")).save_pretrained(tmp_path / "file" / "m")


def test_random_batches_fit_the_model_and_the_last_is_padded(family):
    model = make(family)
    first, last = random_batches(model)
    assert first["input_ids"].shape == (4, 20) and first["attention_mask"].all() and not last["attention_mask"].all()
    assert (last["attention_mask"].sum(dim=1) > 0).all()
    assert int(first["input_ids"].min()) >= 2 and int(first["input_ids"].max()) < model.config.vocab_size
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(random_batches(model), (first, last), strict=True)
    )


def test_padding_does_not_count_in_outputs(family):
    model = make(family, "language")
    batch = inputs(model)
    other = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    torch.testing.assert_close(outputs_of(model, [batch]), outputs_of(model, [other]), rtol=1e-5, atol=1e-5)


def test_gpt2_without_a_padding_token_saves_with_a_classification_head(tmp_path):
    model = make("gpt2", pad_token_id=None)
    assert CompressedModel(model).save_pretrained(tmp_path / "m").max_error == 0.0


def test_a_base_model_loads_through_any_auto_class(family, tmp_path):
    model = cut_unevenly(make(family))
    CompressedModel(model).save_pretrained(tmp_path / "m")
    reloaded = CompressedModel.from_pretrained(tmp_path / "m", AutoModel)
    with torch.no_grad():
        assert torch.equal(outputs(reloaded), model.base_model(**inputs(model))[0])
    assert isinstance(reloaded.compression, CompressionConfig)
