"""A stand-in for the Hugging Face hub's HTTP API: repositories in memory, served on this machine.

Only what a client needs to make a repository, upload by git-LFS, and download: create, branch, preupload, LFS batch,
LFS objects, commit; model info, tree, files with etag and range. Faults can be asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Hub:
    """What the stand-in knows and saw.

    repos     name -> branch -> file -> content
    objects   LFS contents by SHA-256
    private   names of private repositories
    requests  "METHOD path" of every request, in order
    refuse    an upload of the LFS object with this SHA-256 is refused with 403, as often as `refusals` says
    echo      every request is refused with 401 and a body that repeats the token
    """

    token: str = "hf_standin"
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    refuse: str = ""
    refusals: int = 0
    echo: bool = False
    endpoint: str = ""

    def uploads(self) -> list[str]:
        """SHA-256 of the objects that were sent, in order."""
        return [r.rpartition("/")[2] for r in self.requests if r.startswith("PUT /lfs/")]

    def commit_of(self, repo: str, revision: str) -> str | None:
        """A digest of a branch's content stands for its commit; a commit's own name finds it again."""
        for branch, files in self.repos.get(repo, {}).items():
            listing = json.dumps({n: hashlib.sha256(c).hexdigest() for n, c in sorted(files.items())})
            commit = hashlib.sha1(listing.encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        commit = self.commit_of(repo, revision)
        branches = self.repos.get(repo, {})
        return next((files for b, files in branches.items() if self.commit_of(repo, b) == commit), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        if self.hub.echo:
            return self._send(401, {"error": f"bad credentials: {self.headers.get('Authorization')}"})
        for pattern, allowed, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in allowed:
                writes = method in ("POST", "PUT") and not path.startswith("/lfs/")
                if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                    return self._send(401, {"error": "Invalid username or password."})
                return handler(self, body, *match.groups())
        return self._send(404, {"error": f"no such page: {path}"})

    def _send(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        content = raw if raw is not None else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = (
            f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        )
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", **url})
        self.hub.repos[name] = {"main": {}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self._send(200, url)

    def card(self, body: bytes) -> None:
        """The hub reads a card's front matter before it takes it."""
        parts = json.loads(body)["content"].split("---\n")
        warnings = [] if len(parts) > 2 else [{"message": "empty or missing yaml metadata in repo card"}]
        valid = bool(warnings) or isinstance(yaml.safe_load(parts[1]), dict)
        errors = [] if valid else [{"message": "the front matter is no mapping"}]
        return self._send(200 if valid else 400, {"errors": errors, "warnings": warnings})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo]
        if branch in branches:
            return self._send(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        return self._send(201)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        have = self.hub.repos.get(repo, {}).get(revision)
        if have is None:
            return self._missing("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
        answer = []
        for file in json.loads(body)["files"]:
            content, lfs = have.get(file["path"]), file["path"].endswith(LFS_SUFFIXES)
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if content is not None:
                git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
                entry["oid"] = hashlib.sha256(content).hexdigest() if lfs else git
            answer.append(entry)
        return self._send(200, {"files": answer})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(entry)
        return self._send(200, {"transfer": "basic", "objects": objects})

    def lfs(self, body: bytes, oid: str) -> None:
        if oid == self.hub.refuse and self.hub.refusals > 0:
            self.hub.refusals -= 1
            return self._send(403, {"error": "the storage is not in the mood"})
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "content does not match its name"})
        self.hub.objects[oid] = body
        return self._send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.repos[repo][revision])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.repos[repo][revision] = files
        commit = self.hub.commit_of(repo, revision)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        return self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        files = self.hub.files(repo, revision or "main")
        if files is None:
            return self._missing("RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(files)]
        sha = self.hub.commit_of(repo, revision or "main")
        fields = {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []}
        return self._send(200, fields)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        files = self.hub.files(repo, revision)
        if files is None:
            return self._missing("RevisionNotFound")
        headers = {"X-Repo-Commit": self.hub.commit_of(repo, revision) or ""}
        if name not in files:
            return self._missing("EntryNotFound", headers)
        content = files[name]
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, headers=headers, raw=content)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self._send(206, headers=headers, raw=part)

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, tuple[str, ...], Any]] = [
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.card),
    (rf"/api/models/{_REPO}/branch/(.+)", ("POST",), _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/(.+)", ("POST",), _Handler.preupload),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), _Handler.batch),
    (r"/lfs/(\w+)", ("PUT",), _Handler.lfs),
    (rf"/api/models/{_REPO}/commit/(.+)", ("POST",), _Handler.commit),
    (rf"/api/models/{_REPO}/revision/(.+)", ("GET", "HEAD"), _Handler.info),
    (rf"/api/models/{_REPO}", ("GET", "HEAD"), _Handler.info),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
