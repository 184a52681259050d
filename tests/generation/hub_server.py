"""A stand-in for the Hugging Face hub at the border of HTTP: repositories, commits and files, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_abcdefghijklmnop"


class Hub(ThreadingHTTPServer):
    """Holds the files of each repository by name, and what was asked of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.commits: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo: str) -> str:
        content = json.dumps({name: hashlib.sha256(file).hexdigest() for name, file in self.files[repo].items()})
        return hashlib.sha1(content.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'owner')}/{asked['name']}"
            self.server.created.append(asked)
            self.server.files.setdefault(name, {})
            return self._answer(200, {"url": f"{self.server.address}/{name}", "id": name, "name": name})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|branch|commit)/([^/?]+).*", self.path)
        assert found is not None, self.path
        repo, what, revision = found[1], found[2], found[3]
        if what == "branch":
            self.server.branches.append(revision)
            return self._answer(200, {})
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer(200, {"files": modes})
        rows = [json.loads(line) for line in body.splitlines()]
        for row in rows:
            if row["key"] == "file":
                self.server.files[repo][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        self.server.commits.append({"revision": revision, **rows[0]["value"]})
        sha = self.server.sha(repo)
        url = f"{self.server.address}/{repo}/commit/{sha}"
        return self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/[^/?]+)?(\?.*)?", self.path):
            if (repo := found[1]) not in self.server.files:
                message = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                return self._answer(404, {"error": "Repository not found"}, message)
            siblings = [{"rfilename": name} for name in self.server.files[repo]]
            return self._answer(200, {"id": repo, "sha": self.server.sha(repo), "siblings": siblings})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", self.path):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files[found[1]].items()
            ]
            return self._answer(200, rows)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:  # The client may ask for what a hub need not know.
            return self._answer(404)
        content = self.server.files[found[1]][found[3]]
        etag = hashlib.sha1(content).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.sha(found[1])})

    do_HEAD = do_GET


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs the server while the block runs."""
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
