"""Fixtures of the contract with Hugging Face: a Hub on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub import TOKEN, Hub, running
from huggingface_hub import constants


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub on loopback, which this process uses with a token that may write, online and with an empty cache."""
    with running() as served:
        settings = {
            "ENDPOINT": served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "stored_tokens"),
        }
        # read from the environment when huggingface_hub was imported
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
        # Transformers keeps a client with the address of its first call; 5.17 has none
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_OIDC_ID_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
        # a failed request is tried again at once
        clock = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        huggingface_hub.close_session()
        yield served
        huggingface_hub.close_session()
