"""A weight quantizer of one's own: by object or by name, in training and without, and packed models that need none."""

import subprocess
import sys

import pytest
import torch
from families import inputs, make, outputs
from training import tiny_arguments

from lmcompress import CompressedModel, LmcompressError
from lmcompress.numerics.quantizers.base import WeightQuantizer
from lmcompress.numerics.quantizers.learned import initial_clip, pact
from lmcompress.numerics.quantizers.registry import QUANTIZERS, quantizer_for, quantizer_name
from lmcompress.numerics.quantizers.uniform import symmetric
from lmcompress.quantization import QuantizationConfig, WeightScheme, quantize
from lmcompress.trainers import QuantizationTrainer

SOURCE = """
from lmcompress.numerics.quantizers.base import WeightQuantizer
from lmcompress.numerics.quantizers.learned import initial_clip, pact

halved = WeightQuantizer(pact, lambda weight, **how: initial_clip(weight, **how) / 2, learned=True, bits=(4, 8))
something_else = 3
"""

tightly = WeightQuantizer(symmetric, lambda weight, **how: 0.7 * initial_clip(weight, **how), bits=(4,), by_rows=True)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_quantizers.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "my_quantizers:halved"


def rows(count=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(number % 3)} for number, row in enumerate(ids)]


def config_of(quantizer):
    scheme = WeightScheme(quantizer=quantizer, bits=4, granularity="row")
    return QuantizationConfig(weights=scheme, embeddings=scheme)


RELOAD = """
import sys

import torch

import lmcompress
from transformers import AutoModelForSequenceClassification

sys.path = [folder for folder in sys.path if folder]
try:
    import my_quantizers
except ImportError:
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
    batch = torch.load(sys.argv[2])
    torch.save(model(**batch).logits.detach(), sys.argv[3])
else:
    raise SystemExit("the quantizer can be imported here")
"""


def test_a_packed_model_loads_where_its_quantizer_cannot_be_imported(own_module, tmp_path):
    model = make("bert", "classification")
    args = tiny_arguments(tmp_path / "run", max_steps=3, learning_rate=1e-3)
    trainer = QuantizationTrainer(model, args, quantization=config_of(own_module), train_dataset=rows())
    starts = {name: scale.detach().clone() for name, scale in trainer.quantization.faked.scales().items()}
    trainer.train()
    assert any(not torch.equal(scale, starts[name]) for name, scale in trainer.quantization.faked.scales().items())
    trainer.finish()
    assert {row.quantizer for row in trainer.report.matrices} == {own_module}
    CompressedModel(trainer.student).save_pretrained(tmp_path / "packed")
    batch = inputs(model)
    torch.save(batch, tmp_path / "batch.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = [str(tmp_path / name) for name in ("packed", "batch.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", RELOAD, *files], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = trainer.student.eval()(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


def test_an_object_does_what_its_name_does(own_module):
    by_name, by_object = make("bert"), make("bert")
    quantize(by_name, config_of(f"{__name__}:tightly"))
    report = quantize(by_object, config_of(tightly))
    assert torch.equal(outputs(by_name), outputs(by_object))
    assert {row.quantizer for row in report.matrices} == {f"{__name__}:tightly"}
    assert report.config["weights"]["quantizer"] == f"{__name__}:tightly"


def test_a_scheme_survives_dumping_by_the_name_of_its_quantizer(own_module):
    for scheme in (WeightScheme(quantizer=own_module, bits=8), WeightScheme(quantizer=tightly, bits=4)):
        for again in (WeightScheme(**scheme.model_dump()), WeightScheme.model_validate_json(scheme.model_dump_json())):
            assert again.function() is scheme.function()


def test_a_quantizer_without_a_name_is_reported_by_its_function():
    local = WeightQuantizer(symmetric, bits=(8,))
    config = QuantizationConfig(weights=WeightScheme(quantizer=local), embeddings=None)
    report = quantize(make("bert"), config)
    assert {row.quantizer for row in report.matrices} == {"custom symmetric"} == {quantizer_name(local)}


def test_only_rows_that_are_looked_up_are_quantized_where_the_quantizer_says_so():
    scheme, weight = WeightScheme(quantizer=tightly, bits=4, granularity="row"), torch.randn(6, 8)
    assert scheme.function().by_rows
    assert torch.equal(scheme.rounded(weight).values[2:4], scheme.rounded(weight[2:4]).values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_quantizers:halvde", "weight quantizer 'my_quantizers:halvde': my_quantizers has no 'halvde'.*'halved'"),
        ("my_quantizers:something_else", "must be a lmcompress.numerics.quantizers.base.WeightQuantizer, got int"),
        ("no_such_module:x", "cannot import 'no_such_module'"),
        ("halved", "unknown weight quantizer 'halved'.*a custom one is named module:attribute"),
    ],
)
def test_names_that_find_nothing_are_refused(own_module, name, message):
    with pytest.raises(ValueError, match=message):
        WeightScheme(quantizer=name, bits=4)


def test_bits_are_those_of_the_quantizer(own_module):
    with pytest.raises(LmcompressError, match="'my_quantizers:halved' has bits 4, 8, got 2; at 2 there are"):
        quantizer_for(own_module, 2)
    with pytest.raises(LmcompressError, match="one that learns, got 'my_quantizers:halved'.*one of laq, twn"):
        quantize(make("bert"), config_of(own_module))
    assert QUANTIZERS["pact"].function is pact is quantizer_for(own_module, 4).function
