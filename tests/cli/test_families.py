"""``lmcompress families``."""

from __future__ import annotations

import json

from transformers import LlamaConfig

from lmcompress import cli
from lmcompress.families import FAMILIES
from lmcompress.proof import CLAIMS


def test_all_families_are_listed_with_what_they_lack(capsys):
    assert cli.run_app(["families"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FAMILIES)
    (mpnet,) = (line for line in shown.splitlines() if "mpnet" in line)
    assert "heads, attention, quantized attention" in mpnet


def test_one_family_is_shown_with_its_reasons(capsys):
    assert cli.run_app(["families", "mpnet"]) == 0
    assert "one table of relative positions" in " ".join(capsys.readouterr().out.split())
    assert cli.run_app(["families", "mpnet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["mpnet"] and list(found["mpnet"]["claims"]) == list(CLAIMS)


def test_the_family_of_a_folder_is_found(tmp_path, capsys):
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert cli.run_app(["families", str(tmp_path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["llama"]


def test_what_is_not_described_and_what_is_nothing_are_one_message_each(capsys):
    assert cli.run_app(["families", "vit"]) == 2
    assert "the family 'vit' is not described" in capsys.readouterr().err
    assert cli.run_app(["families", "no/such/model"]) == 2
    assert "is neither a family nor a model with a config.json" in " ".join(capsys.readouterr().err.split())
