"""A model hub on the loopback interface: the part of the Hugging Face hub's HTTP interface that huggingface_hub uses to
read and write model repositories. It keeps every request, so that a test can count them."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants


def _commit_id(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by id (path -> bytes), and branches that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # the token that a gated repository asks for
    private: bool = False
    pull_requests: dict[int, str] = field(default_factory=dict)  # number -> author, all open

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = _commit_id(len(self.commits), sorted(files.items()))
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


class FakeHub:
    """`with FakeHub() as hub:` serves `hub.repositories` at `hub.url`; `hub.requests` lists "METHOD path" in order."""

    write_token = "hf_write"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.status: int | None = None  # answer everything with this
        self.cut: int | None = None  # send only so many bytes of a file, then hang up

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, files: dict[str, bytes], **settings: object) -> Repository:
        repository = self.repositories[name] = Repository(**settings)
        repository.commit(files)
        return repository

    def take_requests(self) -> list[str]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken

    def __enter__(self) -> "FakeHub":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.status is not None:
            return self._error(self.hub.status, None)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "models"]:
            name, action = "/".join(parts[2:4]), parts[4:]
        else:
            name, action = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        authorised = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.private and authorised != self.hub.write_token):
            # What the hub says without a token: it does not tell missing from private.
            return self._error(401, "RepoNotFound")
        if self.command == "POST":
            return self._write(repository, name, action, body, parse_qs(url.query))
        if action == ["discussions"]:
            return self._discussions(name, repository, parse_qs(url.query))
        revision = action[1] if len(action) > 1 else "main"
        commit = revision if revision in repository.commits else repository.branches.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        if action[:1] == ["resolve"]:
            if repository.token not in (None, authorised):
                return self._error(403 if authorised else 401, "GatedRepo")
            return self._file(files, "/".join(action[2:]), commit)
        if action[:1] == ["tree"]:
            return self._json(
                [{"type": "file", "path": p, "size": len(c), "oid": _blob_id(c)} for p, c in sorted(files.items())]
            )
        return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        if path not in files:
            return self._error(404, "EntryNotFound", commit)
        content = files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_blob_id(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: self.hub.cut])
        return None

    def _discussions(self, name: str, repository: Repository, query: dict) -> None:
        wanted = query.get("author", [None])[0]
        listed = [
            {
                "title": "Adding `safetensors` variant of this model",
                "num": number,
                "author": {"name": author},
                "isPullRequest": True,
                "status": "open",
                "createdAt": "2023-01-01T00:00:00.000Z",
                "repo": {"name": name, "type": "model"},
            }
            for number, author in repository.pull_requests.items()
            if wanted in (None, author)
        ]
        return self._json({"discussions": listed, "count": len(listed), "start": 0})

    def _create(self, request: dict) -> None:
        if not self._may_write():
            return self._error(401, None)
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        known = name in self.hub.repositories
        if not known:
            private = request.get("visibility") == "private" or bool(request.get("private"))
            self.hub.add(name, {".gitattributes": b""}, private=private)
        return self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def _write(self, repository: Repository, name: str, action: list[str], body: bytes, query: dict) -> None:
        if not self._may_write():
            return self._error(403, None)
        kind, revision = action[0], action[1]
        if kind == "branch":
            if revision in repository.branches:
                return self._error(409, None)
            repository.branches[revision] = repository.branches["main"]
            return self._json({})
        if kind == "preupload":
            asked = json.loads(body)["files"]
            return self._json({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        files = dict(repository.commits[repository.branches[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        pull_request = "create_pr" in query
        commit = repository.commit(files, "refs/pr/1" if pull_request else revision)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        return self._json(answer)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.write_token}"

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str | None, commit: str | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob_id(content: bytes) -> str:
    """Git's id of a file's content, the hub's ETag of files outside LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub take `url` for the hub. The caller closes its session at the end."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
