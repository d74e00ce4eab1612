"""A hub on this machine: the two answers that downloads ask for, with faults on demand."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"
SMALL = 4096  # files from this size on are "large": the listing has their sha256


@dataclass
class Hub:
    """`files`: repository -> name -> content. The faults concern names of files.

    `cut`: bytes after which the connection breaks, once. `damaged`: what is sent has one other byte. `statuses`: answers to give first.
    `requests`: (name, first byte) of every file that was asked for.
    """

    files: dict[str, dict[str, bytes]]
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    statuses: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    endpoint: str = ""

    def listing(self, repo_id: str) -> dict:
        siblings = []
        for name, content in self.files[repo_id].items():
            entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if len(content) >= SMALL:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo_id, "modelId": repo_id, "sha": REVISION, "gated": "manual" if self.gated else False, "private": False,
                "tags": ["license:apache-2.0"], "cardData": {"license": "apache-2.0"}, "siblings": siblings}  # fmt: skip


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub.endpoint` answers inside the with block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith("/api/models/"):
                repo_id = path.removeprefix("/api/models/")
                if repo_id in hub.files:
                    self.answer(200, json.dumps(hub.listing(repo_id)).encode(), {"Content-Type": "application/json"})
                else:
                    self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            if f"/resolve/{REVISION}/" not in path:
                self.answer(404, b"{}")
                return
            repo_id, _, name = path.removeprefix("/").partition(f"/resolve/{REVISION}/")
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            hub.requests.append((name, first))
            if hub.statuses.get(name):
                status, headers = hub.statuses[name].pop(0)
                self.answer(status, b"no", headers)
                return
            content = bytearray(hub.files[repo_id][name])
            if name in hub.damaged:
                content[len(content) // 2] ^= 1
            body = bytes(content[first:])
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body)))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            end = hub.cut.pop(name, None)
            self.wfile.write(body if end is None else body[:end])
            if end is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
