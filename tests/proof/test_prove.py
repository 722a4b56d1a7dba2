"""The proof of a family: every declared one passes it, and a wrong description does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, LlamaConfig

from lmcompress.errors import LmcompressError, UnknownFamilyError
from lmcompress.families import FAMILIES
from lmcompress.proof import CLAIMS, prove, tiny_config, tiny_model, typical_config
from lmcompress.proof.table import cells, markdown, proven, recorded

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_holds_what_its_row_of_the_table_says(model_type):
    proof = prove(typical_config(model_type))
    assert recorded([proof]) == {model_type: proven()[model_type]}
    # what does not hold is refused, with the reason
    assert {outcome.claim for outcome in proof.failed} == set(FAMILIES[model_type].refused)
    for outcome in proof.failed:
        assert FAMILIES[model_type].refused[outcome.claim] in outcome.reason


def test_the_table_is_of_all_families_and_all_claims():
    assert list(proven()) == list(FAMILIES)
    assert all(list(row["claims"]) == list(CLAIMS) for row in proven().values())
    assert markdown() in PAGE.read_text(encoding="utf-8")


def wrong(monkeypatch, model_type, **fields):
    monkeypatch.setitem(FAMILIES, model_type, replace(FAMILIES[model_type], **fields))
    return AutoConfig.for_model(model_type)


@pytest.mark.parametrize(
    ("model_type", "fields", "claims"),
    [
        # the gate stays as wide as it was
        ("llama", {"ffn_gate": ""}, ["neurons", "rtn"]),
        # the norm before the head is taken for one after every block
        ("llama", {"final_norm": ""}, ["hidden", "hidden_features"]),
        # caches are indexed by numbers that are no longer dense
        ("llama", {"layer_index": ()}, ["generation"]),
        # queries are cut twice, values never
        ("bert", {"value": "attention.self.query"}, ["heads"]),
        # the norm before the head is not named
        ("gpt2", {"final_norm": ""}, ["hidden_features"]),
    ],
)
def test_a_wrong_description_is_found(monkeypatch, model_type, fields, claims):
    proof = prove(wrong(monkeypatch, model_type, **fields), claims)
    assert [outcome.holds for outcome in proof.outcomes] != [True] * len(claims)
    assert all(outcome.reason for outcome in proof.failed)


def test_a_family_of_which_no_tiny_model_can_be_made_is_one_message(monkeypatch):
    # a list with an entry for each block, of which nothing is known
    with pytest.raises(LmcompressError, match="no tiny qwen3 can be built: .*layer_types"):
        prove(wrong(monkeypatch, "qwen3", per_layer=()))


def test_a_proof_changes_neither_the_random_state_nor_a_config():
    config = BertConfig()
    before, state = config.to_dict(), torch.get_rng_state()
    prove(config, ["heads"])
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tiny_config_keeps_what_is_not_a_size():
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=8, attention_bias=True, rms_norm_eps=0.5)
    tiny = tiny_config(config)
    assert (tiny.num_attention_heads, tiny.num_key_value_heads, tiny.num_hidden_layers) == (4, 2, 3)
    assert tiny.attention_bias and tiny.rms_norm_eps == 0.5
    assert sum(p.numel() for p in tiny_model(config).parameters()) < 20_000


def test_cells_are_no_where_one_claim_is():
    claims = {name: {"holds": True, "reason": ""} for name in CLAIMS}
    assert all(cell.holds for cell in cells(claims).values())
    claims["generation"] = {"holds": None, "reason": ""}
    claims["gptq"] = {"holds": False, "reason": "too far off"}
    row = cells(claims)
    assert row["generation"].holds is None
    assert (row["quantization"].holds, row["quantization"].reasons) == (False, ("too far off",))


def test_what_cannot_be_proven_is_refused():
    with pytest.raises(LmcompressError, match=r"no claim 'haeds'; did you mean 'heads'\?"):
        prove(BertConfig(), ["haeds"])
    with pytest.raises(UnknownFamilyError, match="'vit'"):
        prove(AutoConfig.for_model("vit"))
