"""A hub on loopback: what huggingface_hub calls to make a repository and commit files to it, and what it was sent."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """By SHA-256, what was uploaded as large files."""
        self.sent: list[tuple[str, bytes]] = []
        """Address and body of every request, without its header of authorization."""
        self.fails_with: int | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._note(b"")
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        repository = self.server.repositories.get(name)
        if repository is None:
            self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            files = [{"rfilename": each} for each in repository.files]
            self._reply(200, {"id": name, "modelId": name, "private": repository.private, "siblings": files})

    def do_PUT(self) -> None:
        body = self._body()
        self._note(body)
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self._reply(200, {})

    def do_POST(self) -> None:
        body = self._body()
        self._note(body)
        address, server = self.path.partition("?")[0], self.server
        if self.headers.get("Authorization") != f"Bearer {server.token}":
            self._reply(401, {"error": "Invalid credentials"})
        elif server.fails_with is not None:
            self._reply(server.fails_with, {"error": "as asked"})
        elif address == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            server.repositories[name] = Repository(asked.get("visibility") == "private")
            self._reply(200, {"url": f"{server.address}/{name}", "name": name, "id": name})
        elif address == "/api/validate-yaml":
            self._reply(200, {"warnings": [], "errors": []})
        elif "/preupload/" in address:
            files = [
                {"path": each["path"], "uploadMode": _mode(each["path"]), "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._reply(200, {"files": files})
        elif address.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{server.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._reply(200, {"transfer": "basic", "objects": objects})
        else:
            self._commit(address, body)

    def _commit(self, address: str, body: bytes) -> None:
        name = address.removeprefix("/api/models/").partition("/commit/")[0]
        repository = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        commit = {"commitUrl": f"{self.server.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        self._reply(200, commit)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _note(self, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        self.server.sent.append((self.path, body + json.dumps(headers).encode()))

    def _reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def hub(monkeypatch: Any, token: str) -> Iterator[HubServer]:
    """A hub that takes `token`, which is also in HF_TOKEN; huggingface_hub goes there."""
    from huggingface_hub import constants

    server = HubServer(token)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage is no part of this hub
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
