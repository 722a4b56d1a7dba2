"""PEFT: adapters trained on a compressed model, saved, loaded again and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from client_drivers import SENTENCES, lora
from client_forms import tokenizers
from client_table import Refusal, client

_PACKED = Refusal(
    r"Target module PackedLinear.*not trainable: model\.dequantize\(\) first.* is not supported",
    "packed weights are not trained: train before packing, or `dequantize()` first",
)


@pytest.mark.filterwarnings("ignore")
@client("PEFT, LoRA", int8=_PACKED, int4=_PACKED)
def test_an_adapter_is_trained_saved_and_merged(form, run, tmp_path):
    cases = [
        (form.classifier, form.folders[0], "AutoModelForSequenceClassification", ["query", "value", "dense"]),
        (form.decoder, form.folders[1], "AutoModelForCausalLM", ["c_attn", "c_fc", "c_proj"]),
    ]
    for (model, folder, auto, targets), tokenizer in zip(cases, tokenizers(), strict=True):
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        given = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
        given["labels"] = [0, 1, 2] if "Sequence" in auto else given["input_ids"]
        found = run("lora", folder, str(tmp_path / auto), auto, targets, given)
        with torch.no_grad():
            loss = model(**{name: torch.tensor(values) for name, values in given.items()}).loss
        assert found["losses"][0] == pytest.approx(float(loss), rel=1e-4)
        assert found["losses"][-1] < found["losses"][0]
        trained, merged = torch.tensor(found["trained"]), torch.tensor(found["merged"])
        torch.testing.assert_close(torch.tensor(found["again"]), trained, rtol=1e-3, atol=1e-4)
        if form.name == "self-loading int8":
            # the inputs of a merged matrix are rounded, those of an adapter are not
            assert (merged - trained).norm() < 0.1 * trained.norm()
            continue
        torch.testing.assert_close(merged, trained, rtol=1e-3, atol=1e-4)
        expected = lora(copy.deepcopy(model), str(tmp_path / f"{auto}-memory"), auto, targets, given)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        torch.testing.assert_close(trained, torch.tensor(expected["trained"]), rtol=1e-3, atol=1e-4)
