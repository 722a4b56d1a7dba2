"""transformers itself: pipelines, every way to generate."""

from __future__ import annotations

import pytest
import torch
from client_drivers import PROMPTS, SENTENCES, generate, pipelines
from client_forms import make_form, tokenizers
from client_table import Refusal, client


@client("pipeline")
def test_pipelines_give_what_the_models_in_memory_give(form, run):
    found = run("pipelines", *form.folders, list(form.folders))
    expected = pipelines(form.classifier, form.decoder, list(form.folders))
    assert found["texts"] == expected["texts"]
    torch.testing.assert_close(torch.tensor(found["classes"]), torch.tensor(expected["classes"]))
    # and what the model itself gives
    words, _ = tokenizers()
    logits = form.classifier(**words(SENTENCES[:1], return_tensors="pt")).logits
    torch.testing.assert_close(torch.tensor(found["classes"][:1]), logits.softmax(-1).detach())


# a range for the whole tensor of inputs: one token after another gives other numbers than all at once
_DEPENDS_ON_THE_BATCH = ("int8", "self-loading int8")


@pytest.fixture(scope="session")
def assistant(tmp_path_factory):
    """A dense model that drafts tokens for the others."""
    return make_form("dense", tmp_path_factory.mktemp("assistant")).folders[1]


def _tokens(how, form, run, assistant):
    found = run("generate", form.folders[1], how, form.folders[1], assistant)
    assert found == generate(form.decoder, how, form.folders[1], assistant)
    return found


def _greedy_without_cache(model, rows=2):
    """The likeliest next token, ten times, from the logits of everything before it."""
    _, pieces = tokenizers()
    found = []
    for text in PROMPTS[:rows]:
        ids = pieces(text, return_tensors="pt")["input_ids"]
        for _ in range(10):
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            # generate was told to go on
            logits[pieces.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        found.append(ids[0].tolist())
    longest = max(map(len, found))
    return [[pieces.pad_token_id] * (longest - len(row)) + row for row in found]


@client("generate, greedy")
def test_greedy(form, run, assistant):
    found = _tokens("greedy", form, run, assistant)
    if form.name not in _DEPENDS_ON_THE_BATCH:
        assert found == _greedy_without_cache(form.decoder)


@client("generate, beam search")
def test_beam(form, run, assistant):
    _tokens("beam", form, run, assistant)


@client("generate, sampling")
def test_sampling(form, run, assistant):
    assert _tokens("sampling", form, run, assistant) != _tokens("greedy", form, run, assistant)


@client("generate, assisted")
def test_assisted(form, run, assistant):
    found = _tokens("assisted", form, run, assistant)
    if form.name not in _DEPENDS_ON_THE_BATCH:
        assert found == _greedy_without_cache(form.decoder, rows=1)


@client("generate, static cache")
def test_static_cache(form, run, assistant):
    found = _tokens("static cache", form, run, assistant)
    if form.name not in _DEPENDS_ON_THE_BATCH:
        assert found == _greedy_without_cache(form.decoder)


_UNEVEN = Refusal(
    "continuous batching .* is not possible with this model",
    "its cache has one shape for all blocks, that of the config: blocks with unequal numbers of heads do not fit",
)


@pytest.mark.filterwarnings("ignore")
@client("generate, continuous batching (`generate_batch`)", pruned=_UNEVEN, streams=_UNEVEN, self_loading=_UNEVEN)
def test_continuous_batching(form, run):
    found = run("continuous", form.folders[1], form.folders[1])
    _, pieces = tokenizers()
    for text, tokens in zip(PROMPTS, found, strict=True):
        inputs = pieces(text, return_tensors="pt")
        alone = form.decoder.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert tokens == alone[0, inputs["input_ids"].shape[1] :].tolist()
