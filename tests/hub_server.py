"""A stand-in for the Hub on the loopback: what huggingface_hub asks of the real one, with switches for its failures."""

import base64
import dataclasses
import hashlib
import http
import json
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

ROUTES = {
    re.compile(r"/api/repos/create"): "create",
    re.compile(r"/api/models/(?P<repo>.+)/tree/(?P<revision>[^/]+)"): "tree",
    re.compile(r"/api/models/(?P<repo>.+)/revision/(?P<revision>[^/]+)"): "info",
    re.compile(r"/api/models/(?P<repo>.+)/preupload/(?P<revision>[^/]+)"): "preupload",
    re.compile(r"/api/models/(?P<repo>.+)/commit/(?P<revision>[^/]+)"): "commit",
    re.compile(r"/api/models/(?P<repo>.+)"): "info",
    re.compile(r"/(?P<repo>.+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"): "resolve",
}


@dataclasses.dataclass
class Repository:
    """One model repository: its commits, its branches, and the token it asks for."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str) -> str:
        """Make `files` the content of `branch` and return the commit hash."""
        parent = self.branches.get(branch, "")
        sha = hashlib.sha1(parent.encode() + repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """Serve repositories at `url` for as long as the `with` block lasts.

    Attributes:
        repositories: by repository id.
        tokens: the access tokens that exist; any other is refused with 401, as the real Hub does.
        readers: the tokens that may not write.
        requests: every request so far, in order.
        cut: names of the files whose next download breaks off half way.
        status: answer everything with this HTTP status, where it is set.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.readers: set[str] = set()
        self.requests: list[Request] = []
        self.cut: set[str] = set()
        self.status: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        # The loop looks for the end of the block every half second by default.
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Make `files` the content of a branch of a repository and return the commit hash.

        Args:
            repo_id: the repository, created where it is new.
            files: file name to content.
            branch: created where it is new.
            token: makes the repository private: only this token sees it.
            gated: everyone sees the list of files, no one the files.
        """
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.token, repository.gated = token, gated
        if token is not None:
            self.tokens.add(token)
        return repository.commit(files, branch)

    def downloads(self) -> list[str]:
        """Return the names of the files whose content was asked for, in order."""
        resolve = re.compile(r".+/resolve/[^/]+/(.+)")
        matches = [resolve.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return [match.group(1) for match in matches if match]


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        authorization = self.headers["Authorization"]
        self.hub.requests.append(Request(self.command, path, self.headers["Range"], authorization))
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            if self.hub.status is not None:
                raise _Refused(self.hub.status)
            if self.token is not None and self.token not in self.hub.tokens:
                raise _Refused(401, message="Invalid credentials in Authorization header")
            self._route(path)
        except _Refused as refusal:
            self._send(refusal.status, b"", {name: value for name, value in refusal.headers.items() if value})

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""

    def _route(self, path: str) -> None:
        for pattern, name in ROUTES.items():
            if match := pattern.fullmatch(path):
                fields = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items()}
                getattr(self, f"_serve_{name}")(**fields)
                return
        raise _Refused(404)

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or repository.token not in (None, self.token):
            # Without a token the real Hub does not tell a missing repository from a private one.
            raise _Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo_id)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _serve_info(self, repo: str, revision: str = "main") -> None:
        sha, files = self._commit(repo, revision)
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def _serve_tree(self, repo: str, revision: str) -> None:
        _, files = self._commit(repo, revision)
        self._send_json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )

    def _serve_resolve(self, repo: str, revision: str, file: str) -> None:
        if self._repository(repo).gated:
            raise _Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
        sha, files = self._commit(repo, revision)
        if file not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[file]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start, status = 0, http.HTTPStatus.OK
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start, status = int(match.group(1)), http.HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and file in self.hub.cut:
            self.hub.cut.remove(file)
            self.close_connection = True
            self._send(status, content[start:], headers, sent=(len(content) - start) // 2)
        else:
            self._send(status, content[start:], headers)

    def _serve_create(self) -> None:
        if self.token is None:
            raise _Refused(401, message="Invalid username or password.")
        if self.token in self.hub.readers:
            raise _Refused(403, message="You don't have the rights to create a model here")
        wanted = json.loads(self.content)
        repo_id = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        status = http.HTTPStatus.CONFLICT if repo_id in self.hub.repositories else http.HTTPStatus.OK
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.hub.repositories.setdefault(repo_id, Repository(token=self.token if private else None))
        if not repository.commits:
            repository.commit({}, "main")
        self._send_json({"url": f"{self.hub.url}/{repo_id}"}, status)

    def _serve_preupload(self, repo: str, revision: str) -> None:
        self._commit(repo, revision)
        files = json.loads(self.content)["files"]
        answer = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        self._send_json({"files": answer})

    def _serve_commit(self, repo: str, revision: str) -> None:
        _, files = self._commit(repo, revision)
        rows = [json.loads(line) for line in self.content.splitlines()]
        added = {
            row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"
        }
        sha = self._repository(repo).commit(files | added, revision)
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def _send_json(self, value: Any, status: int = http.HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], sent: int | None = None) -> None:
        """Answer with `content`, or with the first `sent` bytes of what its length promises."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


def run_with_hub(hub: "HubServer", directory: Path, *arguments: str) -> str:
    """Run `levit-flax` in a new process that connects to this Hub only, and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "levit_flax", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(directory / "hub"), "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, done
    return done.stdout
