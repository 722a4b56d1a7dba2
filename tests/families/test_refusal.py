"""What a family cannot do is refused where it begins, with the reason and a way out."""

import pytest
from transformers import AutoConfig

from lmcompress.activations.capture import Capture
from lmcompress.errors import LmcompressError
from lmcompress.proof import tiny_model
from lmcompress.pruning import Gates, cut, full, score
from lmcompress.quantization import POST_TRAINING, ActivationScheme, quantize
from lmcompress.students import by_layers, by_width, share_layers


@pytest.fixture
def mpnet():
    return tiny_model(AutoConfig.for_model("mpnet"))


REASON = "all blocks share one table of relative positions"


def test_parts_that_a_family_cannot_lose(mpnet):
    for begin in (
        lambda: full(mpnet, ["heads"]),
        lambda: Gates(mpnet, ["neurons", "heads"]),
        lambda: score(mpnet, "l2", ["heads"]),
        lambda: by_width(mpnet, 0.5),
    ):
        with pytest.raises(LmcompressError, match=rf"mpnet cannot do this \(heads\): {REASON}.*`lmcompress families"):
            begin()
    assert full(mpnet, ["neurons"]).parts() == ("neurons",)
    assert by_layers(mpnet, 2).layers == (0, 2)


def test_a_mask_of_them_changes_nothing(mpnet):
    before = {name: tensor.clone() for name, tensor in mpnet.state_dict().items()}
    heads = full(tiny_model(AutoConfig.for_model("bert")), ["heads"]).map(lambda ones: ones.clone().fill_(False))
    with pytest.raises(LmcompressError, match=REASON):
        cut(mpnet, heads)
    assert all(tensor.equal(before[name]) for name, tensor in mpnet.state_dict().items())


def test_attention_that_cannot_be_heard_is_refused_before_a_pass(mpnet):
    with pytest.raises(LmcompressError, match="computes attention by itself; use hidden states"):
        Capture(mpnet, [("probabilities", 1)])
    config = POST_TRAINING.model_copy(update={"attention": True, "activations": ActivationScheme()})
    with pytest.raises(LmcompressError, match="computes attention by itself; set attention to false"):
        quantize(mpnet, config)


def test_blocks_that_are_unlike_are_not_shared():
    model = tiny_model(AutoConfig.for_model("modernbert"))
    with pytest.raises(LmcompressError, match=r"modernbert cannot do this \(shared\)"):
        share_layers(model)
