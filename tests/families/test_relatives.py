"""families: BERT's relatives are cut as they are gated, reloaded as they were saved, and quantized."""

import pytest
import torch
from families import inputs, outputs
from relatives import RELATIVES, make_relative
from transformers import AutoConfig, AutoModelForSequenceClassification

from lmcompress import CompressedModel
from lmcompress.families import anatomy_of
from lmcompress.families.positions import first_position, positions_of
from lmcompress.pruning import PARTS, Gates, cut, full
from lmcompress.quantization import quantize

ENDINGS = ("Model", "ForSequenceClassification", "ForMaskedLM")


def _masked(model, part):
    """A mask of one part that is uneven over the blocks."""
    generator = torch.Generator().manual_seed(0)
    mask = full(model, [part]).map(lambda ones: torch.rand(ones.shape, generator=generator) < 0.7)
    for _, _, tensor in mask.items():
        tensor.view(-1)[0], tensor.view(-1)[-1] = True, False
    return mask


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", RELATIVES)
def test_what_is_cut_answers_as_it_did_gated_and_does_so_reloaded(name, part, tmp_path):
    model = make_relative(name)
    whole, mask = outputs(model), _masked(model, part)
    with Gates(model, [part]) as gates:
        gates.set(mask)
        gated = outputs(model)
    cut(model, mask)
    assert not torch.allclose(gated, whole)
    torch.testing.assert_close(outputs(model), gated, rtol=1e-4, atol=1e-5)
    CompressedModel(model).save_pretrained(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(outputs(again), outputs(model))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", RELATIVES)
def test_int8_is_close_and_reloads_the_same(name, ending, tmp_path):
    model = make_relative(name, ending)
    before = outputs(model)
    quantize(model, progress=False)
    after = outputs(model)
    assert 0 < (after - before).norm() / before.norm() < 0.1
    CompressedModel(model).save_pretrained(tmp_path / "model")
    torch.testing.assert_close(outputs(CompressedModel.from_pretrained(tmp_path / "model").eval()), after)


@pytest.mark.parametrize("name", RELATIVES)
def test_every_matrix_of_a_block_is_described(name):
    assert all(block.undescribed() == [] for block in anatomy_of(make_relative(name)).blocks)


@pytest.mark.parametrize("name", RELATIVES)
def test_the_longest_input_fills_the_table_of_positions(name):
    model = make_relative(name)
    config = AutoConfig.for_model(name, max_position_embeddings=40)
    longest = positions_of(config)
    assert longest == 40 - first_position(model.config)
    with torch.no_grad():
        model(input_ids=inputs(model)["input_ids"][:1, :1].expand(1, longest))
        with pytest.raises((IndexError, RuntimeError), match="range|bounds|size"):
            model(input_ids=inputs(model)["input_ids"][:1, :1].expand(1, longest + 1))
