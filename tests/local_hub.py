"""A Hugging Face hub on this machine, as far as its client asks: what a model or dataset has, and its files.

Folders are ROOT/models/USER/NAME and ROOT/datasets/USER/NAME, a revision other than main beside them as NAME@REVISION.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Hub(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            _, kind, user, name, *more = *parts, "", "", "", ""
            revision = more[1] if more[:1] == ["revision"] else "main"
            folder = self.folder(kind, user, name, revision) if user and name else None
            if folder is None:
                return self.refuse(kind, user, name)
            if more[0] == "tree":
                return self.fail("EntryNotFound")  # no folder is asked for that is there
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in sorted(folder.rglob("*.*"))]
            about = {"id": f"{user}/{name}", "sha": commit(folder), "siblings": siblings, "private": False, "tags": []}
            text = json.dumps(about | {"downloads": 0, "likes": 0, "disabled": False, "gated": False}).encode()
            return self.send({"Content-Type": "application/json"}, text, body)
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        user, name, _, revision, *inside = parts
        folder = self.folder(kind, user, name, revision)
        if folder is None:
            return self.refuse(kind, user, name)
        file = folder.joinpath(*inside)
        if not file.is_file():
            return self.fail("EntryNotFound")
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        self.send({"X-Repo-Commit": commit(folder), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, data, body)

    def folder(self, kind: str, user: str, name: str, revision: str) -> Path | None:
        home = self.root / kind / user
        for folder in home.glob(f"{name}*"):
            if folder.name in (name if revision == "main" else f"{name}@{revision.replace('/', '-')}",):
                return folder
            if commit(folder) == revision:
                return folder
        return None

    def refuse(self, kind: str, user: str, name: str) -> None:
        known = (self.root / kind / user / name).is_dir()
        self.fail("RevisionNotFound" if known else "RepoNotFound")

    def fail(self, code: str) -> None:
        self.send({"X-Error-Code": code}, b"", body=False, status=404)

    def send(self, headers: dict[str, str], data: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


def commit(folder: Path) -> str:
    """Forty hexadecimal digits, as a commit has."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with what is in `root`, and the paths that were asked for, as the list fills."""
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # It looks so often whether it is to end, which each test waits for.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
