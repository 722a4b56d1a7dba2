"""``lmcompress push``."""

from __future__ import annotations

import pytest

from lmcompress import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "/nowhere", "me/it"], "holds no checkpoint"),
        (["push", "/nowhere", "it"], "must be user/name"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.run_app(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_push_uploads_the_folder(finished, monkeypatch, capsys):
    calls = []

    class Api:
        def __init__(self, token=None):
            del token

        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_folder(self, **options):
            calls.append(options["folder_path"])
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = str(finished / "out" / "student")
    assert cli.run_app(["push", folder, "me/it", "--private"]) == 0
    assert calls == [("me/it", {"private": True, "exist_ok": True}), folder]
    assert "https://hub/commit" in capsys.readouterr().out
