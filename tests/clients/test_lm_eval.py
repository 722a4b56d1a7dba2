"""lm-eval: log-likelihoods of choices and the perplexity of texts, on a task of our own."""

from __future__ import annotations

import pytest
import torch
from client_drivers import SENTENCES, lm_eval
from client_forms import tokenizers
from client_table import client


@pytest.mark.filterwarnings("ignore")
@client("lm-eval")
def test_lm_eval_measures_what_the_model_in_memory_gives(form, run):
    folder = form.folders[1]
    found = run("lm_eval", folder, folder)
    expected = lm_eval(form.decoder, folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), msg=name)
    _, pieces = tokenizers()
    before, after = pieces(SENTENCES[0])["input_ids"], pieces(" mat")["input_ids"]
    with torch.no_grad():
        logits = form.decoder(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    likelihood = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()
    if form.name not in ("int8", "self-loading int8"):
        # elsewhere the row is alone in its batch
        assert found["log-likelihoods"][0][0] == pytest.approx(float(likelihood), rel=1e-4)
