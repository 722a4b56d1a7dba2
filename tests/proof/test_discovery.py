"""Unknown families: what is found is what is declared, what the proof confirms can be done, and the rest is refused."""

from dataclasses import fields

import pytest
from transformers import AutoConfig

from lmcompress.checkpoint.structure import forget
from lmcompress.errors import LmcompressError, UnknownFamilyError
from lmcompress.families import FAMILIES, family_of
from lmcompress.proof import adopt, discover, tiny_model
from lmcompress.pruning import full

UNSEEN = {"packs", "causal_flag", "stream_scaled", "scores", "scaling_at", "expects", "refused", "head_attributes"}
"""What does not show in a forward pass of one model, or is compared by its values."""


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "qwen3", "gemma", "gpt_neox", "modernbert"])
def test_the_parts_that_are_found_are_those_that_are_declared(model_type):
    found, declared = discover(AutoConfig.for_model(model_type)), FAMILIES[model_type]
    differ = {
        field.name: (getattr(found, field.name), getattr(declared, field.name))
        for field in fields(found)
        if field.name not in UNSEEN and getattr(found, field.name) != getattr(declared, field.name)
    }
    # of numbers of blocks in cross-attention, which a plain encoder lacks, nothing is seen
    numbers = differ.pop("layer_index", ((), ()))
    assert not differ and set(numbers[0]) <= set(numbers[1])


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "distilbert"])
def test_the_numbers_of_heads_that_are_found_follow_the_heads(model_type):
    found, declared = discover(AutoConfig.for_model(model_type)), FAMILIES[model_type]
    assert found.head_attributes(3, 5).items() >= declared.head_attributes(3, 5).items()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("umt5", "a forward pass of token ids alone fails"),
        ("mpnet", "calls the attention function 0 times"),
    ],
)
def test_what_is_no_stack_of_blocks_with_one_attention_each_is_not_found(model_type, reason):
    with pytest.raises(LmcompressError, match=rf"the parts of '{model_type}' were not found: .*{reason}"):
        discover(AutoConfig.for_model(model_type))


def test_an_adopted_family_can_lose_what_is_proven_and_nothing_else():
    config = AutoConfig.for_model("olmo2")
    with pytest.raises(UnknownFamilyError, match="olmo2"):
        family_of(config)
    try:
        proof = adopt(config)
        # queries and keys are normed over all heads at once
        assert not proof["heads"].holds and proof["neurons"].holds and proof["layers"].holds
        model = tiny_model(config)
        assert full(model, ["neurons"]).neurons is not None
        with pytest.raises(LmcompressError, match=r"olmo2 cannot do this \(heads\)"):
            full(model, ["heads"])
    finally:
        forget("olmo2")
    with pytest.raises(UnknownFamilyError, match="olmo2"):
        family_of(config)


def test_a_described_family_is_not_adopted():
    with pytest.raises(LmcompressError, match="'bert' is described already"):
        adopt(AutoConfig.for_model("bert"))
