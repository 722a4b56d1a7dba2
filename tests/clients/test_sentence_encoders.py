"""sentence-transformers: what SentenceEncoder writes is loaded, and embeds the same."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_folders import SENTENCES, write_encoder

from lmcompress.checkpoint.cutting import keep_hidden
from lmcompress.pruning import PruningConfig, Target, prune
from lmcompress.quantization import quantize
from lmcompress.sentences import SentenceEncoder
from lmcompress.students.layers import by_layers

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


def _loaded(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize(("dense", "normalize"), [(None, True), ("linear.Identity", True), (None, False)])
def test_what_is_read_is_what_sentence_transformers_reads(tmp_path, pooling, dense, normalize):
    folder = write_encoder(tmp_path / "e", pooling=pooling, dense=dense, normalize=normalize)
    ours = SentenceEncoder.from_pretrained(folder).encode(SENTENCES)
    np.testing.assert_allclose(_loaded(folder), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["pruned", "narrow", "layers", "int8"])
def test_compressed_folders_embed_the_same(tmp_path, how):
    encoder = SentenceEncoder.from_pretrained(write_encoder(tmp_path / "e"))
    options = {}
    if how == "pruned":
        config = PruningConfig(target=Target(sparsity=0.4), labels="self")
        prune(encoder.model, config, [encoder.tokenize(SENTENCES)])
    elif how == "narrow":
        keep_hidden(encoder.model, range(12))
    elif how == "layers":
        encoder.model = by_layers(encoder.model, 2).model.eval()
        options = {"format": "vanilla"}
    else:
        quantize(encoder.model, progress=False)
    encoder.save_pretrained(tmp_path / "small", **options)
    # ranges of 8-bit inputs are those of a batch, in which padding counts as sentence-transformers calls it: each alone
    ours = np.concatenate([encoder.encode([text]).numpy() for text in SENTENCES])
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    theirs = np.concatenate([loaded.encode([text]) for text in SENTENCES])
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_sentence_transformers_writes_is_read(tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = write_encoder(tmp_path / "e", dense="linear.Identity")
    SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "again"))
    ours = SentenceEncoder.from_pretrained(tmp_path / "again").encode(SENTENCES)
    np.testing.assert_allclose(_loaded(folder), ours, rtol=1e-4, atol=1e-5)
