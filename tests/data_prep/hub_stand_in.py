"""A local HTTP server that speaks as much of the hub's protocol as reading a data set needs, and fails on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY, REVISION, TOKEN = "org/name", "0123456789abcdef0123456789abcdef01234567", "hf_token_of_a_test"


class Hub:
    """Serves `root` as the data set org/name to whoever shows the token.

    Attributes:
        unavailable: how many of the next requests for a file are answered 503.
        breaks: how many answers with a file's body break off in the middle.
        requests: number of requests by method and kind.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.unavailable, self.breaks = root, 0, 0
        self.requests = Counter[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """The environment that points huggingface_hub here."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_TOKEN": TOKEN}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        resolve, api = f"/datasets/{REPOSITORY}/resolve/{REVISION}/", f"/api/datasets/{REPOSITORY}/"
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(resolve):
            self._file(request, path.removeprefix(resolve))
        elif path == f"{api}revision/{REVISION}":
            self._send(request, 200, json.dumps({"id": REPOSITORY, "sha": REVISION, "siblings": self._tree()}).encode())
        elif path.startswith(f"{api}tree/{REVISION}"):
            folder = path.removeprefix(f"{api}tree/{REVISION}").strip("/")
            rows = [row for row in self._tree() if not folder or row["path"].startswith(f"{folder}/")]
            if "recursive=True" not in request.path and "recursive=true" not in request.path:
                rows = [row for row in rows if "/" not in row["path"].removeprefix(f"{folder}/" if folder else "")]
            self._send(request, 200, json.dumps(rows).encode())
        else:
            self._send(request, 404, b"{}")

    def _tree(self) -> list[dict[str, Any]]:
        rows = []
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            row = {"path": name, "rfilename": name, "oid": "0" * 40, "size": path.stat().st_size}
            rows.append({**row, "type": "file" if path.is_file() else "directory"})
        return rows

    def _file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        path = self.root / name
        self.requests[f"{request.command} file"] += 1
        if not path.is_file():
            self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif self.unavailable:
            self.unavailable -= 1
            self._send(request, 503, b"{}")
        else:
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": REVISION}
            code, span = 200, request.headers.get("Range")
            if span:
                first, last = span.removeprefix("bytes=").split("-")
                headers["Content-Range"] = f"bytes {first}-{last or len(data) - 1}/{len(data)}"
                code, data = 206, data[int(first) : int(last) + 1 if last else None]
            self._send(request, code, data, headers)

    def _send(
        self, request: BaseHTTPRequestHandler, code: int, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if code in (200, 206) and headers and self.breaks:
            self.breaks -= 1
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        request.wfile.write(data)
