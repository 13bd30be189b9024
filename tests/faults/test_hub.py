"""The hub: gated, without the model or the revision, out of reach."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from cli.tiny import Cli, Outcome, spawn

from .fault import check

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
LICENCE = f"accept the licence at https://huggingface.co/{LLAMA}, then: hf auth login"
ANSWERS = {
    "gated": (403, "GatedRepo"),
    "missing": (404, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
    "failing": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Answers every request as its server is told to."""

    def answer(self) -> None:
        status, code = ANSWERS[self.server.mood]  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    do_HEAD = do_GET = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "mood, line, fix",
    [
        (
            "gated",
            f"'llama' is {LLAMA} on the hub, which is gated",
            LICENCE,
        ),
        ("missing", f"{LLAMA} on the hub, which was not found", "check the id"),
        ("revision", "has no revision 'v9'", "--revision"),
    ],
)
def test_the_hub_refuses(hub: ThreadingHTTPServer, tmp_path: Path, mood: str, line: str, fix: str) -> None:
    hub.mood = mood  # type: ignore[attr-defined]
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "none",
    }
    done = spawn("plan", "llama", "--revision", "v9", **settings)
    check(Outcome(done.returncode, done.stdout, done.stderr), 7, line, fix)


def test_no_network_names_the_id_and_the_way_round(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = cli("convert", "llama", "--method", "hedgehog")
    check(done, 7, f"'llama' is {LLAMA} on the hub, which cannot be reached", "linearize convert /path/to/Llama-3.2-1B-Instruct")
    assert not list(tmp_path.glob("llama*"))
