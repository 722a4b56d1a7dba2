"""folder: the files by which sentence-transformers pools an export as its graph does."""

import json

import pytest

from lmcompress.export.folder import write_pooling

MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}


@pytest.mark.parametrize(("pooling", "mode"), MODES.items())
@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_is_told_the_pooling(pooling, mode, normalize, tmp_path):
    write_pooling(tmp_path, pooling=pooling, normalize=normalize, width=16)
    modules = json.loads((tmp_path / "modules.json").read_text())
    kinds = [one["type"].rpartition(".")[2] for one in modules]
    assert kinds == ["Transformer", "Pooling"] + ["Normalize"] * normalize
    assert all((tmp_path / one["path"]).is_dir() for one in modules)
    said = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert said.pop("word_embedding_dimension") == 16
    assert [name for name, chosen in said.items() if chosen] == [mode]


def test_vectors_of_tokens_have_none(tmp_path):
    write_pooling(tmp_path, pooling=None, normalize=False, width=16)
    assert not any(tmp_path.iterdir())
