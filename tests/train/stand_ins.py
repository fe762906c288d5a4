"""Local HTTP servers that speak as much of the Hub's and of W&B's protocols as uploads need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 100_000


class Server(ABC):
    """Calls `answer(method, path, body)` for every request; use it in a `with`.

    Attributes:
        requests: (method, path) of all requests so far.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                server.requests.append((self.command, path))
                status, answer = server.answer(self.command, path, body, dict(self.headers))
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @abstractmethod
    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        """The status, and what is sent as JSON."""


class Hub(Server):
    """Model repositories: created, branched, committed to, listed. Files of `LFS_BYTES` and more are LFS.

    Attributes:
        branches: repository -> branch -> file -> content.
        flips: names of files whose stored content is changed by a bit.
    """

    token = "hf_token_of_a_test"

    def __init__(self) -> None:
        super().__init__()
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.flips: set[str] = set()
        self._objects: dict[str, bytes] = {}

    @property
    def variables(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        if path.startswith("/objects/"):
            self._objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if headers.get("Authorization", headers.get("authorization")) != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(row) for row in json.loads(body)["objects"]]}
        org, name, what, *rest = path.removeprefix("/api/models/").split("/")
        branches, rest_of_path = self.branches[f"{org}/{name}"], "/".join(rest)
        if what == "branch":
            known = rest_of_path in branches
            branches.setdefault(rest_of_path, dict(branches["main"]))
            return (409, {"error": "exists"}) if known else (200, {})
        if rest_of_path not in branches:
            return 404, {"error": "Revision Not Found"}
        files = branches[rest_of_path]
        if what == "preupload":
            mode = {True: "lfs", False: "regular"}
            rows = [
                {"path": row["path"], "shouldIgnore": False, "uploadMode": mode[row["size"] >= LFS_BYTES]}
                for row in json.loads(body)["files"]
            ]
            return 200, {"files": rows}
        if what == "commit":
            self._commit(files, [json.loads(line) for line in body.splitlines()])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{org}/{name}/commit/0"}
        assert what == "tree", path
        return 200, [self._row(path, content) for path, content in sorted(files.items())]

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repository = f"{wanted['organization']}/{wanted['name']}"
        if repository in self.branches:
            return 409, {"error": "You already created this repo", "url": f"{self.url}/{repository}"}
        self.private[repository] = bool(wanted.get("private", wanted.get("visibility") == "private"))
        self.branches[repository] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        return 200, {"url": f"{self.url}/{repository}"}

    def _object(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["oid"] in self._objects:
            return row
        return {**row, "actions": {"upload": {"href": f"{self.url}/objects/{row['oid']}", "header": {}}}}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "lfsFile":
                files[value["path"]] = self._objects[value["oid"]]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])

    def _row(self, path: str, content: bytes) -> dict[str, Any]:
        if path in self.flips:
            content = bytes([content[0] ^ 1]) + content[1:]
        row = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(content) >= LFS_BYTES:
            row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return row


class WandbViews(Server):
    """The part of W&B's GraphQL that saves and reads workspaces.

    Attributes:
        views: name -> what was saved last, with its `spec` parsed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, dict[str, Any]] = {}

    @property
    def variables(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true", "WANDB_MODE": "online"}

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        if not path.endswith("/graphql"):
            return 200, {}
        asked = json.loads(body)
        query, given = asked["query"], asked.get("variables") or {}
        data: dict[str, Any] = {"viewer": {"id": "1", "entity": "team", "username": "me", "flags": "{}",
                                           "teams": {"edges": []}}}  # fmt: skip
        if "upsertView" in query:
            self.views[given["name"]] = {**given, "spec": json.loads(given["spec"])}
            data = {"upsertView": {"view": {"id": f"id of {given['name']}", "name": given["name"]}, "inserted": True}}
        elif "allViews" in query:
            nodes = [
                {"id": f"id of {name}", "displayName": view["displayName"], "spec": json.dumps(view["spec"])}
                for name, view in self.views.items()
                if given["viewName"] in name
            ]
            data = {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}
        return 200, {"data": data}
