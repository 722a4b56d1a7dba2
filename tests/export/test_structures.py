"""Every structure that lmcompress makes, packed and exported to both runtimes: the outputs of the packed model."""

import pytest
import torch
from compacting import compact_uneven, everything, grouped, low_rank, separable, shared, shared_uneven
from compacting import embeddings as factorized
from exported import STATIC, batches, packed
from families import VOCAB, cut_to_nothing, cut_unevenly, inputs, make

from lmcompress.export import export_model, load_exported
from lmcompress.pruning.vocabulary.tables import shrink, tables_of

pytestmark = pytest.mark.filterwarnings("ignore")


def fewer_tokens(model):
    """Two thirds of the vocabulary."""
    kept = range(VOCAB * 2 // 3)
    shrink(model, tables_of(model), kept, {token: token for token in kept})
    return model


CUTS = {
    "uneven heads and widths, a layer gone": cut_unevenly,
    "no heads, no neurons, hidden cut": cut_to_nothing,
    "vocabulary cut": fewer_tokens,
    "low rank": low_rank,
    "grouped": grouped,
    "factorized embeddings": factorized,
    "separable": separable,
    "shared layers": shared,
    "shared, uneven": shared_uneven,
    "compact, uneven": compact_uneven,
    "one of each": everything,
}
# these are not quantized: lmcompress refuses both at once
DENSE = set(list(CUTS)[3:])
FAST = [("no heads, no neurons, hidden cut", "onnx"), ("no heads, no neurons, hidden cut", "openvino")]
OTHERS = [(cut, to) for cut in CUTS for to in ("onnx", "openvino") if (cut, to) not in FAST]


@pytest.mark.parametrize(("cut", "to"), [*FAST, *(pytest.param(cut, to, marks=pytest.mark.slow) for cut, to in OTHERS)])
def test_structures_keep_their_outputs_in_the_runtimes(cut, to, tmp_path):
    model = CUTS[cut](make("bert", "classification"))
    model = model if cut in DENSE else packed(model, STATIC)
    report = export_model(model, tmp_path / "out", to=to, batches=batches(model))
    # sums round at 1e-6, and a few codes that lie between two go to the other one
    assert report.comparison.relative_error < 0.03 and report.comparison.agreement == 1.0
    assert (report.products.integer > 0) == (cut not in DENSE)
    given = inputs(model, rows=3, length=9, seed=5)
    given["input_ids"] %= model.config.vocab_size
    with torch.no_grad():
        wanted = model(**given).logits
    got = load_exported(tmp_path / "out", precision="f32" if to == "openvino" else None)(**given).logits
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 0.05
