"""``lmcompress inspect``."""

from __future__ import annotations

import json

from packing import packed

from lmcompress import cli
from lmcompress.checkpoint.cutting import drop_heads, keep_heads
from lmcompress.families import anatomy_of
from lmcompress.model import CompressedModel


def test_inspect_itemises_bytes_and_tells_what_was_checked(finished, capsys):
    assert cli.run_app(["inspect", str(finished / "out" / "student"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(part["bytes"] for part in shown["bytes_by_part"].values()) == 4 * shown["parameters"]
    assert set(shown["bytes_by_part"]) == {"embeddings", "block 0", "block 1", "head and rest"}
    assert shown["saved"]["equivalence"]["max_error"] == 0
    assert cli.run_app(["inspect", str(finished / "out" / "student"), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "round-trip check when saved" in shown and "save: vanilla" in shown and "classifier.weight" in shown


def test_inspect_of_a_run_names_its_models(finished, capsys):
    assert cli.run_app(["inspect", str(finished / "out")]) == 2
    assert "its models are" in capsys.readouterr().err


def test_inspect_shows_heads_widths_and_empty_blocks(make_model, tmp_path, capsys):
    model = make_model("bert")
    keep_heads(anatomy_of(model).blocks[0], [1])
    drop_heads(anatomy_of(model).blocks[1])
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert cli.run_app(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "1 + 24" in shown and "0 + 24" in shown and "4 + 24" in shown
    assert "no attention left in block 1" in shown and "feed-forward network left" not in shown


def test_inspect_itemises_codes_and_scales_of_packed_weights(make_model, tmp_path, capsys):
    model = packed(make_model("gpt2", "language"), "minmax", 4, inputs="dynamic")
    CompressedModel(model).save_pretrained(tmp_path / "m")
    assert cli.run_app(["inspect", str(tmp_path / "m"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == sum(p.numel() for p in make_model("gpt2", "language").parameters())
    assert shown["packed"]["embedding_codes"] == 64 * 8 and shown["packed"]["kernel"]
    assert sum(shown["packed"][name] for name in ("codes", "embedding_codes", "scales", "dense")) == sum(
        part["bytes"] for part in shown["bytes_by_part"].values()
    )
    assert cli.run_app(["inspect", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "embedding codes" in shown and "bits for each of" in shown and "has no codes in place of weights" in shown


def test_a_missing_folder_is_named(capsys):
    assert cli.run_app(["inspect", "/nowhere"]) == 2
    assert "no such folder: /nowhere" in capsys.readouterr().err
