"""accelerate: empty weights filled from a checkpoint, and device maps."""

from __future__ import annotations

import torch
from client_drivers import SENTENCES
from client_forms import tokenizers
from client_table import Refusal, client

AUTO = ("AutoModelForSequenceClassification", "AutoModelForCausalLM")


def _agree(driver, form, run):
    for model, folder, auto, tokenizer in zip(
        (form.classifier, form.decoder), form.folders, AUTO, tokenizers(), strict=True
    ):
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        with torch.no_grad():
            expected = model(**batch).logits
        given = {name: batch[name].tolist() for name in ("input_ids", "attention_mask")}
        for found in run(driver, folder, auto, given):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


@client("accelerate, `device_map`")
def test_a_device_map_gives_the_model_in_memory(form, run):
    _agree("mapped", form, run)


_STREAMS = Refusal(
    "tensors that are streams need from_pretrained", "streams are decoded by `from_pretrained`, as with `device_map`"
)
_NO_SKELETON = Refusal(
    "this checkpoint is compressed: use from_pretrained with trust_remote_code=True",
    "a skeleton in other than stock shapes needs lmcompress: use `from_pretrained`, as with `device_map`",
)


@client(
    "accelerate, `init_empty_weights` and `load_checkpoint_and_dispatch`",
    streams=_STREAMS,
    self_loading=_NO_SKELETON,
    self_loading_int8=_NO_SKELETON,
)
def test_empty_weights_are_filled_with_the_model_in_memory(form, run):
    _agree("dispatched", form, run)
