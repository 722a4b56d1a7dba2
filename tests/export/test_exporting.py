"""Export of encoders: right values in both runtimes, integers, tasks, and nothing written where something is wrong."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from exported import BY_TOKEN, DYNAMIC, FOUR_BITS, SHIFTED, STATIC, batches, bert, packed
from families import BY_NAME, HIDDEN, LABELS, VOCAB, inputs, make
from onnx import load as load_graph
from transformers import BertForQuestionAnswering

from lmcompress import LmcompressError
from lmcompress.checkpoint.encoding import unpacked
from lmcompress.errors import EquivalenceError
from lmcompress.export import ExportConfig, export_model, load_exported, operators
from lmcompress.export.eight_bit import ByteMatmul
from lmcompress.export.graph import write_openvino
from lmcompress.export.heads import SequenceClassification
from lmcompress.export.sessions import session_of
from lmcompress.kernels.dispatch import using
from lmcompress.model import CompressedModel

pytestmark = pytest.mark.filterwarnings("ignore")

MATMULS = 3 * 4
"""Of three blocks: queries, keys and values in one, the output of attention, and two of the feed-forward network."""


def expected(model, **given):
    # kernels round in ways of their own
    with torch.no_grad(), using(kernel="reference"):
        return model(**given)


@pytest.fixture(scope="module")
def static():
    """A packed model with static ranges."""
    return bert(STATIC)


@pytest.fixture(scope="module")
def onnx(static, tmp_path_factory):
    """It, exported for ONNX Runtime: the folder and the report."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    return folder, CompressedModel(static).export(folder, batches=batches(static))


@pytest.fixture(scope="module")
def openvino(tmp_path_factory):
    """A model with dynamic ranges, exported for OpenVINO, which needs static ones."""
    folder, model = tmp_path_factory.mktemp("openvino") / "out", bert(BY_TOKEN)
    return folder, export_model(model, folder, to="openvino", batches=batches(model)), model


def test_the_graph_has_the_outputs_of_the_packed_model_for_any_batch_and_length(onnx, static):
    folder, report = onnx
    loaded = load_exported(folder, threads=1)
    for rows, length in ((1, 2), (1, 40), (5, 3)):
        given = inputs(static, rows=rows, length=length, seed=rows)
        wanted = expected(static, **given).logits
        assert float((loaded(**given).logits - wanted).norm() / wanted.norm()) < 0.03
    assert report.comparison.relative_error < 0.03 and report.comparison.agreement == 1.0


def test_all_packed_matmuls_are_integer_ones(onnx, openvino):
    for report in (onnx[1], openvino[1]):
        # the pooler and the classifier are dense
        assert (report.products.integer, report.products.total) == (MATMULS, MATMULS + 2)


def test_queries_keys_and_values_are_one_matmul(onnx):
    graph = load_graph(onnx[0] / "model.onnx").graph
    widths = [one.dims[1] for one in graph.initializer if one.name.endswith("codes")]
    assert widths.count(3 * HIDDEN) == 3


def test_dynamic_ranges_are_calibrated_for_openvino_and_the_report_says_what_that_changes(openvino):
    folder, report, model = openvino
    assert report.activations == "static" and "calibrated on 2 batches" in report.notes[0]
    assert report.comparison.relative_error < 0.03 < report.against_original.relative_error + 0.03 < 0.3
    given = inputs(model, rows=3, length=8, seed=3)
    assert load_exported(folder)(**given).logits.shape == (3, LABELS)


@pytest.mark.parametrize(
    ("activations", "attention", "to"),
    [
        (BY_TOKEN, False, "onnx"),
        pytest.param(DYNAMIC, False, "onnx", marks=pytest.mark.slow),
        pytest.param(SHIFTED, True, "onnx", marks=pytest.mark.slow),
        pytest.param(STATIC, True, "onnx", marks=pytest.mark.slow),
        pytest.param(STATIC, True, "openvino", marks=pytest.mark.slow),
        pytest.param(FOUR_BITS, False, "onnx", marks=pytest.mark.slow),
        pytest.param(FOUR_BITS, False, "openvino", marks=pytest.mark.slow),
        pytest.param(None, False, "onnx", marks=pytest.mark.slow),
        pytest.param(None, False, "openvino", marks=pytest.mark.slow),
    ],
)
def test_ranges_as_trained(activations, attention, to, tmp_path):
    model = bert(activations, attention=attention)
    report = export_model(model, tmp_path / "out", to=to, batches=batches(model))
    # a code between two goes to either
    assert report.comparison.relative_error < 0.03
    assert report.products.integer >= (0 if activations is None else MATMULS)
    assert report.against_original is None


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["static", "dynamic", "none"])
def test_other_ranges_are_compared_with_a_packed_model_that_has_them(asked, tmp_path):
    model = bert(DYNAMIC if asked == "static" else STATIC)
    report = export_model(model, tmp_path / "out", activations=asked, batches=batches(model))
    assert report.activations == asked and report.comparison.relative_error < 0.03
    assert report.comparison.relative_error < report.against_original.relative_error < 0.5


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_tied_matrix_is_stored_once(to, tmp_path):
    model = packed(make("bert", "language", vocab_size=2048), STATIC)
    report = export_model(model, tmp_path / "out", to=to, batches=batches(model))
    assert report.comparison.relative_error < 0.03 and report.products.integer > MATMULS
    assert 2048 * HIDDEN < report.bytes < 2 * 2048 * HIDDEN + 2048 * 8 + (100_000 if to == "onnx" else 350_000)
    weights = tmp_path / "out" / ("model.onnx" if to == "onnx" else "openvino_model.bin")
    codes = model.get_input_embeddings().matrix().codes().numpy().tobytes()
    assert weights.read_bytes().count(codes[: 512 * HIDDEN]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "electra-projected", "gpt2"])
@pytest.mark.parametrize("head", ["classification", "tokens", "base"])
def test_families_and_heads(family, head, tmp_path):
    model = packed(make(family, head), STATIC)
    report = export_model(model, tmp_path / "out", batches=batches(model))
    assert report.comparison.relative_error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_question_answering_has_starts_and_ends(to, tmp_path):
    config = BY_NAME["bert"].make_config(initializer_range=0.3, num_labels=2)
    model = packed(BertForQuestionAnswering(config).eval(), STATIC)
    export_model(model, tmp_path / "out", to=to, batches=batches(model))
    given = inputs(model, rows=3, length=8, seed=3)
    got, wanted = (
        load_exported(tmp_path / "out", precision=None if to == "onnx" else "f32")(**given),
        expected(model, **given),
    )
    mask = given["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        assert float((got[name] - wanted[name])[mask].abs().max()) < 0.05 * float(wanted[name].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_pooled_without_padding(pooling, tmp_path):
    model = bert(STATIC)
    settings = ExportConfig(task="embeddings", pooling=pooling, normalize=True)
    report = export_model(model, tmp_path / "out", settings, batches=batches(model))
    assert report.comparison.agreement is None
    given = inputs(model, rows=3, length=8, seed=3)
    got = load_exported(tmp_path / "out")(**given)
    hidden, mask = expected(model.base_model, **given).last_hidden_state, given["attention_mask"].bool()
    rows = {
        "mean": torch.stack([row[keep].mean(0) for row, keep in zip(hidden, mask, strict=True)]),
        "max": torch.stack([row[keep].amax(0) for row, keep in zip(hidden, mask, strict=True)]),
        "cls": hidden[:, 0],
    }[pooling]
    wanted = torch.nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(got.sentence_embedding, wanted, rtol=0, atol=0.02)
    torch.testing.assert_close(got.last_hidden_state[mask], hidden[mask], rtol=0, atol=0.1)


@pytest.mark.slow
def test_dense_models_are_exported_as_they_are(tmp_path):
    model = unpacked(bert(STATIC))
    report = export_model(model, tmp_path / "out")
    assert report.comparison.relative_error < 1e-5 and report.products.integer == 0
    assert report.activations == "none" and report.comparison.inputs == "random"


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_graph_that_differs_is_not_written_and_the_first_layer_that_differs_is_named(
    to, static, tmp_path, monkeypatch
):
    right = ByteMatmul.forward
    wide = lambda self, x: right(self, x) * (1.5 if self.in_features == 24 else 1.0)  # noqa: E731
    monkeypatch.setattr(ByteMatmul, "forward", wide)
    with pytest.raises(EquivalenceError, match=r"first layer that differs is bert\.encoder\.layer\.0\.output\.dense"):
        export_model(static, tmp_path / "out", to=to, batches=batches(static))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_too_few_equal_answers_are_refused(tmp_path):
    # without the 16 levels of its activations, a model gives a few of these rows another answer
    model = bert(FOUR_BITS)
    rows = [inputs(model, rows=64, length=8, seed=seed) for seed in range(10, 14)]
    with pytest.raises(EquivalenceError, match=r"at least 100\.00% of the rows, got 9"):
        export_model(model, tmp_path / "out", activations="none", agreement=1.0, tolerance=1.0, batches=rows)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(static, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")

    def save(*args, **kwargs):
        raise full

    monkeypatch.setattr("lmcompress.export.exporting.write_graph", save)
    with pytest.raises(LmcompressError, match="No space left on device.*free some space"):
        export_model(static, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"to": "tensorrt"},
            "to of an export: Input should be 'onnx', 'openvino', 'compressed-tensors' or 'gguf', got 'tensorrt'",
        ),
        ({"opset": 9}, "opset of an export: Input should be greater than or equal to 18, got 9"),
        ({"task": "embedings"}, "no task 'embedings' to export for; did you mean 'embeddings'"),
        ({"task": "question_answering"}, "a BertForSequenceClassification cannot be exported for question_answering"),
        ({"speed": 3}, "speed of an export: Extra inputs are not permitted"),
        ({"pooling": "mean"}, "pooling is of task='embeddings', got task sequence_classification"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(settings, message, static, tmp_path):
    with pytest.raises(LmcompressError, match=message):
        export_model(static, tmp_path / "out", **settings)


def test_an_opset_without_codes_of_4_bits_is_refused(tmp_path):
    model = bert(None, bits=4)
    with pytest.raises(LmcompressError, match="need opset 21 or later for OpenVINO, got 18; leave out"):
        export_model(model, tmp_path / "out", to="openvino", opset=18)
    assert not list(tmp_path.iterdir())


def test_static_ranges_need_data(tmp_path):
    with pytest.raises(LmcompressError, match="18 activations of this model have dynamic ranges.*give batches"):
        export_model(bert(DYNAMIC), tmp_path / "out", to="openvino")


@pytest.mark.parametrize("to", ["onnx", "openvino", "compressed-tensors"])
def test_batches_of_another_tokenizer_are_refused_before_any_work(to, static, tmp_path):
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    for ids, message in ((torch.full((2, 3), VOCAB), "is the tokenizer"), (torch.ones(1, 41).long(), "40 positions")):
        with pytest.raises(LmcompressError, match=message):
            export_model(static, tmp_path / "out", to=to, batches=[{"input_ids": ids}])
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(static, tmp_path):
    static.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(LmcompressError, match="holds files but no lmcompress_export.json"):
        export_model(static, tmp_path / "checkpoint")


def test_a_missing_library_names_the_extra(static, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(LmcompressError, match=r'openvino must be installed.*pip install -U "lmcompress\[openvino\]"'):
        export_model(static, tmp_path / "out", to="openvino")


@pytest.mark.parametrize(("name", "version"), [("onnxruntime", "1.2.0"), ("onnxscript", "0.1")])
def test_an_old_library_is_refused(name, version, static, tmp_path, monkeypatch):
    known = __import__("importlib.metadata").metadata.version
    monkeypatch.setattr("lmcompress.export.optional.version", lambda n: version if n == name else known(n))
    with pytest.raises(LmcompressError, match=rf"{name} must be \d.*or later, got {version}"):
        export_model(static, tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_threads_may_call_one_exported_model(to, onnx, openvino, static):
    loaded = load_exported({"onnx": onnx, "openvino": openvino}[to][0], threads=1)
    given = [inputs(static, rows=rows, length=length, seed=rows) for rows, length in ((1, 5), (2, 30), (4, 9))]
    wanted = [loaded(**one).logits for one in given]

    def calls(number):
        return all(torch.allclose(loaded(**given[number]).logits, wanted[number], atol=1e-3) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(calls, range(3)))


def test_ids_masks_and_lengths_that_are_wrong_are_refused(onnx, openvino):
    for folder in (onnx[0], openvino[0]):
        loaded = load_exported(folder, threads=1)
        for ids, mask, message in (
            (torch.full((1, 41), 5), None, "40 positions, got 41 tokens: truncate"),
            (torch.tensor([[VOCAB]]), None, f"from 0 to {VOCAB - 1}, got {VOCAB}: is the tokenizer"),
            (torch.ones(2, 3).long(), torch.ones(1, 3), r"must have shape \(2, 3\), got \(1, 3\)"),
            (torch.ones(3).long(), None, r"shape \(batch, length\), at least one, got torch.int64 \(3,\)"),
        ):
            with pytest.raises(LmcompressError, match=message):
                loaded(input_ids=ids, attention_mask=mask)


def test_a_folder_without_a_graph_is_no_exported_model(onnx, tmp_path):
    with pytest.raises(LmcompressError, match="there is no folder"):
        load_exported(tmp_path / "nowhere")
    with pytest.raises(LmcompressError, match="neither model.onnx nor openvino_model.xml"):
        load_exported(tmp_path)
    shutil.copytree(onnx[0], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(LmcompressError, match=r"has no config\.json"):
        load_exported(tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LmcompressError, match="cannot load model.onnx"):
        load_exported(tmp_path / "copy")


def test_a_damaged_config_is_one_message(onnx, tmp_path):
    shutil.copytree(onnx[0], tmp_path / "copy")
    for text in ("{", "[]", '{"model_type": "no such"}', '{"hidden_size": 8}', "\x00"):
        (tmp_path / "copy" / "config.json").write_text(text)
        with pytest.raises(LmcompressError, match=r"cannot read .*config\.json: .*the folder is damaged"):
            load_exported(tmp_path / "copy")


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_what_a_runtime_raises_is_one_message_that_says_what_the_graph_reads(to, onnx, openvino):
    session = session_of({"onnx": onnx, "openvino": openvino}[to][0], threads=1)
    right = {name: np.ones((2, 3), np.int64) for name in session.inputs}
    assert session.run(right)["logits"].shape == (2, LABELS)
    into = {"logits": np.empty((2, LABELS), np.float32)}
    # OpenVINO converts numbers of another kind
    wrongs = [np.ones((2, 3, 4), np.int64), *([np.ones((2, 3), np.float32)] if to == "onnx" else [])]
    for ids in wrongs:
        wrong = right | {"input_ids": ids}
        for call in (lambda: session.run(wrong), lambda: session.run_into(wrong, into)):  # noqa: B023
            with pytest.raises(LmcompressError, match=r"cannot compute the graph .*it reads input_ids \(any, any\)"):
                call()
    session.run_into(right, into)
    np.testing.assert_allclose(into["logits"], session.run(right)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_sums_of_the_largest_codes_do_not_saturate(to, low, tmp_path):
    codes, high = torch.full((16, 64), 127, dtype=torch.int8), float(low + 255)

    class Product(torch.nn.Module):
        def forward(self, x):
            zero = torch.tensor(0, dtype=torch.int8 if low else torch.uint8)
            x = operators.dequantize(operators.quantize(x, torch.ones(()), zero), torch.ones(()), zero)
            return torch.matmul(x, operators.dequantize(codes, torch.ones(16), None, axis=0).t())

    names = {"input_names": ["x"], "output_names": ["y"]}
    program = torch.onnx.export(Product(), (torch.zeros(3, 64),), dynamo=True, verbose=False, opset_version=21, **names)
    program.save(tmp_path / "model.onnx")
    if to == "openvino":
        write_openvino(tmp_path / "model.onnx", tmp_path / "openvino_model.xml", stateful=False)
        (tmp_path / "model.onnx").unlink()
    found = session_of(tmp_path, threads=1).run({"x": np.full((3, 64), high, np.float32)})["y"]
    np.testing.assert_allclose(found, np.full((3, 16), high * 127 * 64), rtol=1e-3)


def test_a_graph_for_one_batch_size_is_refused(static, tmp_path, monkeypatch):
    right = SequenceClassification.forward

    # len() makes a Python number of the example's rows
    def forward(self, *tensors):
        logits = right(self, *tensors)[0]
        return (logits + logits.new_zeros(len(logits), 1),)

    monkeypatch.setattr(SequenceClassification, "forward", forward)
    with pytest.raises(LmcompressError, match="any number of rows and tokens, got 2 alone on axis 0 of input_ids"):
        export_model(static, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_without_a_file_for_the_package_tokenizers_leaves_ids_in_the_program(static, tmp_path):
    class Slow:
        def save_pretrained(self, folder):
            (folder / "vocab.txt").write_text("a\n")

    export_model(static, tmp_path / "out", tokenizer=Slow())
    text = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "vocab.txt").is_file()
    assert "ids = np.array(" in text and "tokenizer.json" not in text


def test_the_record_says_what_was_measured_and_nothing_of_the_machine(onnx):
    folder, report = onnx
    record = json.loads((folder / "lmcompress_export.json").read_text())
    assert record["comparison"]["relative_error"] == report.comparison.relative_error
    assert record["products"] == {"integer": MATMULS, "total": MATMULS + 2, "packed": 0}
    graph = (folder / "model.onnx").read_bytes()
    for text in (str(folder.parent), os.path.expanduser("~"), "site-packages", "lmcompress/export"):
        assert text.encode() not in graph and text not in json.dumps(record)


def test_the_config_is_read_without_lmcompress(onnx):
    config = json.loads((onnx[0] / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "bert" and config["vocab_size"] == VOCAB
