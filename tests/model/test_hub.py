"""A name that is not on this machine is answered quickly, and the answer says whether the name or the network is at
fault: a hub that says no, is broken, refuses to connect, or never answers."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from veritune.errors import ModelError
from veritune.model import hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def server(online: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A hub on this machine; `status` of what it answers can be set."""
    answer = {"status": 404}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            if answer["status"] in (401, 404):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if answer["status"] == 200:
                self.wfile.write(b'{"id": "some/model", "siblings": []}')

        def log_message(self, *args: object) -> None: ...

    running = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    yield answer
    running.shutdown()
    running.server_close()


def refused(name: str = "nobody/nothing") -> str:
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        hub.check(name)
    assert time.monotonic() - started < 5
    return str(caught.value)


def in_cache(cache: Path, name: str) -> None:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")


@pytest.mark.parametrize("status", [401, 404])
def test_a_name_that_the_hub_does_not_know(server: dict[str, int], status: int) -> None:
    server["status"] = status
    assert "the hub has no such model, or it is private" in refused()


def test_a_name_that_it_knows(server: dict[str, int]) -> None:
    server["status"] = 200
    hub.check("some/model")
    assert not constants.HF_HUB_OFFLINE


def test_no_network_and_a_model_that_is_not_here(online: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} cannot be reached" in refused()


def test_a_hub_that_never_answers(online: pytest.MonkeyPatch) -> None:
    online.setattr(hub, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in refused()


def test_a_broken_hub_or_none_does_not_matter_for_a_model_that_is_here(
    server: dict[str, int], tmp_path: Path, online: pytest.MonkeyPatch
) -> None:
    server["status"] = 503
    assert "answered with status 503" in refused()
    in_cache(tmp_path, "some/model")
    hub.check("some/model")
    assert constants.HF_HUB_OFFLINE  # from here on nothing waits for the network
    hub.check("some/model")
    assert "HF_HUB_OFFLINE" in refused()


@pytest.mark.parametrize("name", ["a/b/c", "with space", "a//b", "nothing:here"])
def test_a_name_that_no_hub_could_have(server: dict[str, int], name: str) -> None:
    assert f"model.path = '{name}'" in refused(name)
