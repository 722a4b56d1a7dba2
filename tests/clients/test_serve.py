"""``transformers serve``: a chat over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import client_drivers
import pytest
import torch
from client_forms import tokenizers
from client_table import client

_NATIVE = "import lmcompress\n"
_WITHOUT = f"import runpy, sys\nrunpy.run_path({client_drivers.__file__!r})['without_lmcompress']()\n"
_SERVE = "from transformers.cli.transformers import main\nmain()"


@contextmanager
def _server(folder, code, *arguments):
    """A server that loads models as they are asked for; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", code + _SERVE, "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*program, "--device", "cpu", *arguments], stdout=log, stderr=log, env=environment, cwd=folder
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Addresses of a server with lmcompress, and of one without, by form."""
    with (
        _server(tmp_path_factory.mktemp("native"), _NATIVE) as native,
        _server(tmp_path_factory.mktemp("without"), _WITHOUT, "--trust-remote-code") as without,
    ):
        yield lambda form: without if form.elsewhere else native


@client("`transformers serve`")
def test_a_chat_is_what_the_model_in_memory_generates(form, servers):
    message = "the cat sat on the mat"
    asked = {
        "model": form.folders[1],
        "messages": [{"role": "user", "content": message}],
        "temperature": 0.0,
        "max_tokens": 8,
        "stream": False,
    }
    request = urllib.request.Request(
        f"{servers(form)}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        answer = json.load(urllib.request.urlopen(request, timeout=120))
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())
    _, pieces = tokenizers()
    inputs = pieces(f"{message} ", return_tensors="pt")
    with torch.no_grad():
        tokens = form.decoder.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["choices"][0]["message"]["content"] == pieces.decode(tokens, skip_special_tokens=True)
    assert len(tokens) > 1
