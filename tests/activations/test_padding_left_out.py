"""Vectors of padding are left out, also where a model flattens rows to tokens (OPT's feed-forward network)."""

import torch
from transformers import AutoConfig

from lmcompress.activations.hooks import Taps
from lmcompress.activations.walking import without_padding
from lmcompress.families import anatomy_of
from lmcompress.proof import tiny_model
from lmcompress.proof.tiny import tiny_inputs

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def test_rows_and_flat_tokens_leave_the_same_vectors():
    x = torch.randn(2, 3, 5)
    taps = Taps(tiny_model(AutoConfig.for_model("opt")))
    taps.mask = MASK
    for told in (x, x.flatten(0, 1)):
        assert without_padding(told, MASK).equal(x[MASK])
        assert taps.tokens(told).equal(x[MASK])
    pooled = torch.randn(2, 5)
    assert without_padding(pooled, MASK).equal(pooled)


def test_a_model_that_flattens_gives_one_vector_for_each_token():
    model, counts = tiny_model(AutoConfig.for_model("opt")), []
    with Taps(model) as taps:
        taps.on_input(anatomy_of(model).blocks[0].get("ffn_out"), lambda x: counts.append(len(taps.tokens(x))))
        batch = tiny_inputs(model)
        taps.run(batch)
    assert counts == [int(batch["attention_mask"].sum())]
