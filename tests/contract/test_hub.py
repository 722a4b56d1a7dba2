"""Pushing to a Hub and loading from it again, over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from families import cut_unevenly, make, outputs
from hub import READ_TOKEN
from huggingface_hub import ModelCard
from packing import packed
from transformers import AutoModel, AutoModelForSequenceClassification

from lmcompress import CompressedModel, cli
from lmcompress.checkpoint.pushing import check_destination, push_folder
from lmcompress.checkpoint.schema import Provenance
from lmcompress.errors import EquivalenceError, LmcompressError


def _same(loaded, model):
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture
def folder(tmp_path):
    """A pruned model as it is saved, and what a training leaves beside it."""
    folder = tmp_path / "out" / "model"
    CompressedModel(cut_unevenly(make("bert"))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dense", "pruned", "packed", "streams"])
def test_what_is_pushed_is_what_anyone_loads(kind, hub):
    model = make("bert")
    if kind in ("pruned", "packed"):
        model = cut_unevenly(model) if kind == "pruned" else packed(model, inputs="dynamic")
    compressed = CompressedModel(model)
    address = compressed.push_to_hub("me/ok", storage="zstd" if kind == "streams" else "plain")
    repository = hub["me/ok"]
    assert address == f"{hub.url}/me/ok/commit/{repository.branches['main']}" and not repository.private
    loaded = AutoModelForSequenceClassification.from_pretrained("me/ok")
    _same(loaded, model)
    assert torch.equal(outputs(loaded), outputs(model))
    _same(AutoModel.from_pretrained("me/ok"), model.base_model)
    _same(CompressedModel.from_pretrained("me/ok").model, model)


def test_another_process_loads_it_and_one_that_is_offline_does_not(hub, tmp_path):
    model = cut_unevenly(make("gpt2"))
    CompressedModel(model).push_to_hub("me/ok", private=True)
    code = (
        "import sys, lmcompress, torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "torch.save(Auto.from_pretrained('me/ok').state_dict(), sys.argv[1])"
    )

    def load(home, **more):
        environment = os.environ | hub.environment(tmp_path / home) | more
        program = [sys.executable, "-c", code, str(tmp_path / "state.pt")]
        return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)

    done = load("a")
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert load("b", HF_HUB_OFFLINE="1").returncode != 0


def test_private_branch_message_and_tags_arrive(hub, folder):
    push_folder(
        folder,
        "me/ok",
        private=True,
        revision="small",
        commit_message="Half of it",
        commit_description="by taking heads",
        tags=["pruned", "lmcompress"],
    )
    repository = hub["me/ok"]
    assert repository.private
    assert repository.log == [{"branch": "small", "summary": "Half of it", "description": "by taking heads"}]
    assert repository.files("main").keys() == {".gitattributes"} and "config.json" in repository.files("small")
    card = ModelCard(repository.files("small")["README.md"].decode())
    assert card.data.tags == ["lmcompress", "model-compression", "pruned"]
    assert "## How to load it" in card.text
    _same(
        AutoModelForSequenceClassification.from_pretrained("me/ok", revision="small"),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    # the branch is there already
    push_folder(folder, "me/ok", revision="small", tags="again")
    assert ModelCard(repository.files("small")["README.md"].decode()).data.tags[-1] == "again"


def test_a_pull_request_leaves_the_branch_alone(hub, folder):
    push_folder(folder, "me/ok", tags=["first"])
    main = hub["me/ok"].files()
    assert push_folder(folder, "me/ok", create_pr=True, tags=["second"]) == f"{hub.url}/me/ok/discussions/1"
    assert hub["me/ok"].files() == main and b"second" in hub["me/ok"].files("refs/pr/1")["README.md"]
    # more commits to the same request
    push_folder(folder, "me/ok", revision="refs/pr/1", tags=["third"])
    assert b"third" in hub["me/ok"].files("refs/pr/1")["README.md"]


def test_whoever_may_not_write_may_propose(hub, folder):
    push_folder(folder, "me/ok")
    for revision in (None, "main"):
        assert "/discussions/" in push_folder(
            folder, "me/ok", token=READ_TOKEN, create_pr=True, revision=revision, tags=[str(revision)]
        )


def test_a_name_without_a_user_is_one_of_the_token_s_owner(hub, folder):
    assert "/me/short/commit/" in push_folder(folder, "short")
    assert "config.json" in hub["me/short"].files()


def test_weights_under_other_names_do_not_stay(hub, folder, tmp_path):
    shards = tmp_path / "shards"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(shards, max_shard_size="4KB")
    push_folder(folder, "me/ok")
    assert "model.safetensors" in hub["me/ok"].files()
    push_folder(shards, "me/ok")
    # from_pretrained would take the one file before the shards
    assert "model.safetensors" not in hub["me/ok"].files()
    assert sum(name.endswith(".safetensors") for name in hub["me/ok"].files()) > 1
    _same(AutoModelForSequenceClassification.from_pretrained("me/ok"), model)
    push_folder(folder, "me/ok")
    assert [n for n in hub["me/ok"].files() if "safetensors" in n] == ["model.safetensors"]


def test_only_the_files_of_the_model_are_uploaded(hub, folder):
    everything = {file.name for file in folder.iterdir()}
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "stage.json", ".secret"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_lmcompress.py").write_text("")
    push_folder(folder, "me/ok")
    uploaded = hub["me/ok"].files().keys() - {".gitattributes"}
    assert uploaded == everything | {"tokenizer.json", "modeling_lmcompress.py"}


def test_paths_of_this_machine_are_not_uploaded(hub, tmp_path):
    private = tmp_path / "a secret place" / "teacher model"
    model = cut_unevenly(make("bert"))
    kept = {"task": {"train": f"{private}/train.csv"}, "notes": [f"trained from {tmp_path}/x on 1/2 of it", "~/data/y"]}
    kept |= {"seen": "https://example.org/a/b and </b>", "windows": "from C:\\Users\\me\\data here"}
    compressed = CompressedModel(model, Provenance(base_model=str(private)))
    folder = tmp_path / "model"
    compressed.save_pretrained(folder, report=kept)
    before = (folder / "lmcompress.json").read_bytes()
    push_folder(folder, "me/ok")
    assert (folder / "lmcompress.json").read_bytes() == before
    files = hub["me/ok"].files()
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []
    sent = json.loads(files["lmcompress.json"])
    assert sent["notes"] == ["trained from x on 1/2 of it", "y"] and sent["task"] == {"train": "train.csv"}
    assert sent["seen"] == kept["seen"] and sent["windows"] == "from data here"
    config = json.loads(files["config.json"])
    assert config["quantization_config"]["provenance"]["base_model"] == "teacher model"
    _same(AutoModelForSequenceClassification.from_pretrained("me/ok"), model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad name/x y", "'bad name/x y' is no name on the Hub; expected user/name"),
        ("me/..", r"'me/\.\.' is no name on the Hub"),
        ("a/b/c", "'a/b/c' is no name on the Hub"),
        ("", "'' is no name on the Hub"),
    ],
)
def test_a_name_that_no_hub_has_is_refused_before_anything_is_saved(name, message, hub, monkeypatch):
    compressed = CompressedModel(make("bert"))
    monkeypatch.setattr(compressed, "save_pretrained", lambda *_, **__: pytest.fail("saved"))
    with pytest.raises(LmcompressError, match=message):
        compressed.push_to_hub(name)
    assert hub.requests == []


def test_without_a_token_nothing_is_saved_or_sent(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    needs = "needs a token, and there is none: log in with `hf auth login`, set HF_TOKEN, or pass token="
    with pytest.raises(LmcompressError, match=needs):
        push_folder(folder, "me/ok")
    with pytest.raises(LmcompressError, match=needs):
        check_destination("me/ok", token=False)
    assert hub.requests == []


def test_offline_is_said(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LmcompressError, match="HF_HUB_OFFLINE=1 is set; unset it to push"):
        push_folder(folder, "me/ok")


def test_a_wrong_token_is_said(hub, folder):
    with pytest.raises(LmcompressError, match=r"did not accept the token \(401: Invalid user token.*hf auth login"):
        push_folder(folder, "me/ok", token="hf_wrong")
    assert hub.repositories == {}


@pytest.mark.parametrize(("name", "token"), [("other/x", None), ("me/x", READ_TOKEN)])
def test_no_permission_is_said(name, token, hub, folder):
    with pytest.raises(LmcompressError, match=f"no permission to write to {name} .403: You don't have the rights"):
        push_folder(folder, name, token=token)
    assert hub.repositories == {}


def test_an_unreachable_hub_is_said(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(LmcompressError, match="the connection to the Hub at http://127.0.0.1:1 failed.*push again"):
        push_folder(folder, "me/ok")


_FAILED = r"the Hub at http.* failed, after retries where they help \(50\d: out of order\); push again later"


@pytest.mark.parametrize(
    ("method", "part", "what", "message"),
    [
        ("POST", "/repos/create", 500, _FAILED),
        ("POST", "/preupload/", 503, _FAILED),
        ("POST", "/objects/batch", 502, _FAILED),
        ("PUT", "/lfs/", 500, _FAILED),
        ("POST", "/lfs-verify/", 504, _FAILED),
        ("POST", "/commit/", 500, _FAILED),
        ("POST", "/commit/", 403, "no permission to write to me/ok .403: You don't have the rights"),
        ("POST", "/commit/", 413, r"refused the push to me/ok \(413: out of order\)"),
        (
            "PUT",
            "/lfs/",
            "drop",
            "the connection to the Hub at http.* failed .*unchanged unless the commit got through",
        ),
        ("POST", "/commit/", "drop", "the connection to the Hub at http.* failed"),
        ("POST", "/repos/create", "drop", "the connection to the Hub at http.* failed"),
    ],
)
def test_every_fault_on_the_way_is_one_message_and_a_second_push_mends_it(method, part, what, message, hub, folder):
    hub.fail(method, part, what)
    with pytest.raises(LmcompressError, match=message) as caught:
        push_folder(folder, "me/ok")
    assert "\n" not in str(caught.value)
    assert "me/ok" not in hub.repositories or hub["me/ok"].files().keys() == {".gitattributes"}
    hub.fault = None
    push_folder(folder, "me/ok")
    _same(
        AutoModelForSequenceClassification.from_pretrained("me/ok"),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )


def test_an_upload_that_is_cut_off_goes_on(hub, folder):
    hub.fail("PUT", "/lfs/", "drop", times=2)
    push_folder(folder, "me/ok")
    assert sum(method == "PUT" for method, _ in hub.requests) == 3
    assert "model.safetensors" in hub["me/ok"].files()


def test_a_self_loading_model_is_pushed_with_its_code(hub):
    compressed = CompressedModel(cut_unevenly(make("bert")), Provenance(base_model="/home/me/teacher"))
    compressed.push_to_hub("me/tiny", private=True, format="self_loading")
    files = hub["me/tiny"].files()
    config = json.loads(files["config.json"])
    code = {name.partition(".")[0] + ".py" for name in config["auto_map"].values()}
    assert {"README.md", "config.json", "model.safetensors", "lmcompress.json"} | code <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model is None and "trust_remote_code=True" in card.text
    assert not any(b"/home/me" in content for content in files.values())


def test_nothing_is_pushed_that_fails_the_round_trip_check(hub):
    model = make("bert")
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(EquivalenceError, match="nan"):
        CompressedModel(model).push_to_hub("me/tiny")
    assert hub.requests == []


def test_a_folder_without_a_checkpoint_is_not_pushed(hub, tmp_path):
    with pytest.raises(LmcompressError, match="holds no checkpoint.*push the folder that a run wrote its model to"):
        push_folder(tmp_path, "me/tiny")
    assert hub.requests == []


def test_the_second_push_of_the_same_uploads_nothing(hub, folder):
    first = push_folder(folder, "me/ok")
    hub.requests.clear()
    assert push_folder(folder, "me/ok") == first
    assert not any(method == "PUT" or "/commit/" in path for method, path in hub.requests)


def test_a_damaged_config_is_refused(hub, folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(LmcompressError, match="config.json is not JSON .*save the model again"):
        push_folder(folder, "me/ok")


def test_tags_make_a_card_where_there_is_none(hub, folder):
    (folder / "README.md").unlink()
    push_folder(folder, "me/ok", tags=["a"])
    data = ModelCard(hub["me/ok"].files()["README.md"].decode()).data
    assert (data.tags, data.library_name) == (["a"], "transformers")


def test_the_command_pushes_to_it_and_says_what_failed(hub, folder, capsys):
    assert cli.run_app(["push", str(folder), "me/ok", "--private"]) == 0
    assert f"{hub.url}/me/ok/commit/" in capsys.readouterr().out and hub["me/ok"].private
    hub.fail("POST", "/commit/", 500)
    (folder / "README.md").write_text("new")
    assert cli.run_app(["push", str(folder), "me/ok"]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "push again later" in error and "Traceback" not in error
