# SPDX-License-Identifier: Apache-2.0
"""A small server that speaks the Hub's HTTP API as far as the real client needs it to push a model and to load it."""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from helpers.forked_python import run_python


USER, TOKEN = "someone", "hf_for_the_local_server"
# what the Hub keeps as a large file: by name, by size, or for bytes that are no text
LARGE_NAMES, LARGE_SIZE = (".safetensors",), 10_000_000


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**headers, "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class Store:
    """Repositories in a folder: blobs by their sha256, commits that are written once, branches that point to one."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.RLock()
        (folder / "blobs").mkdir(parents=True)

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def add_blob(self, content: bytes, expected: str | None = None) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if expected not in (None, sha256):
            raise Refused(400, f"the content has the sha256 {sha256}, announced was {expected}")
        self.blob(sha256).write_bytes(content)
        return sha256

    def repository(self, name: str) -> Path:
        path = self.folder / "repositories" / name.replace("/", "--")
        if not path.is_dir():
            raise Refused(404, "Repository not found", "RepoNotFound")
        return path

    def is_private(self, name: str) -> bool:
        return (self.repository(name) / "private").exists()

    def create(self, name: str, private: bool):
        path = self.folder / "repositories" / name.replace("/", "--")
        with self.lock:
            if path.exists():
                raise Refused(409, "You already created this model repo")
            for part in ("commits", "branches"):
                (path / part).mkdir(parents=True)
            if private:
                (path / "private").touch()
            attributes = self._entry(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self._write_commit(path, "main", None, {".gitattributes": attributes}, "initial commit")

    def _entry(self, content: bytes) -> dict:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": self.add_blob(content), "size": len(content), "oid": git, "large": False}

    def _write_commit(self, path: Path, branch: str, parent: str | None, files: dict, summary: str) -> str:
        commit = {"parent": parent, "summary": summary, "files": files, "time": time.time_ns()}
        text = json.dumps(commit, sort_keys=True)
        sha = hashlib.sha1(text.encode()).hexdigest()
        with (path / "commits" / sha).open("x") as file:
            file.write(text)
        (path / "branches" / quote(branch, safe="")).write_text(sha)
        return sha

    def branches(self, name: str) -> dict[str, str]:
        return {unquote(path.name): path.read_text() for path in (self.repository(name) / "branches").iterdir()}

    def resolve(self, name: str, revision: str) -> str:
        sha = self.branches(name).get(revision, revision)
        if not (self.repository(name) / "commits" / sha).is_file():
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit_of(self, name: str, revision: str) -> dict:
        return json.loads((self.repository(name) / "commits" / self.resolve(name, revision)).read_text())

    def files(self, name: str, revision: str = "main") -> dict[str, dict]:
        """Path -> `sha256`, `size`, `oid` and whether it is `large`."""
        return self.commit_of(name, revision)["files"]

    def log(self, name: str, revision: str = "main") -> list[str]:
        """Summaries, newest first."""
        summaries, sha = [], self.resolve(name, revision)
        while sha is not None:
            commit = self.commit_of(name, sha)
            summaries.append(commit["summary"])
            sha = commit["parent"]
        return summaries

    def create_branch(self, name: str, branch: str, start: str):
        with self.lock:
            if branch in self.branches(name):
                raise Refused(409, "Reference already exists")
            (self.repository(name) / "branches" / quote(branch, safe="")).write_text(self.resolve(name, start))

    def commit(self, name: str, branch: str, lines: list[dict]) -> str:
        """Applies a commit, or nothing of it."""
        if not lines or lines[0].get("key") != "header":
            raise Refused(400, "the first line must be the header")
        with self.lock:
            parent, header = self.resolve(name, branch), lines[0]["value"]
            if header.get("parentCommit") not in (None, parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = self.files(name, parent)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            return self._write_commit(self.repository(name), branch, parent, files, header["summary"])

    def _apply(self, files: dict, key: str, value: dict):
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"invalid path {path!r}")
        if key == "file":
            files[path] = self._entry(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            oid, size = value["oid"], value["size"]
            if not self.blob(oid).is_file() or self.blob(oid).stat().st_size != size:
                raise Refused(400, f"{path}: there is no object {oid} of {size} bytes")
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
            files[path] = self._entry(pointer) | {"sha256": oid, "size": size, "large": True}
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(400, f"unknown operation {key!r}")


class Handler(BaseHTTPRequestHandler):
    """One request. `server` is a [`HubServer`]."""

    protocol_version = "HTTP/1.1"
    # headers and body go out in two writes, which would wait for each other
    disable_nagle_algorithm = True
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)", "information"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "information"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/refs", "references"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_information"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "upload_modes"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_batch"),
        ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "large_upload"),
        ("POST", r"/large/verify", "large_verify"),
        ("(?:GET|HEAD)", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
    WRITING = ("create_repository", "create_branch", "upload_modes", "commit", "large_batch")

    def log_message(self, *_):
        pass

    def route(self, path: str) -> tuple[str, dict[str, str]]:
        for method, pattern, action in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                return action, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        raise Refused(404, f"this server does not know {self.command} {path}")

    def handle_request(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        try:
            action, parts = self.route(address.path)
            # the body is read whatever the answer, or the connection could not serve the next request
            self.body = self.read_body(action)
            self.check_access(action, parts.get("name"))
            self.server.requests.append((self.command, address.path))
            getattr(self, action)(**parts)
        except Refused as refused:
            content = json.dumps({"error": refused.message}).encode()
            self.answer(refused.status, content, **refused.headers, **{"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self, action: str) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        allowed = self.server.allowance(action, length)
        content = self.rfile.read(allowed)
        if allowed < length:
            # with a linger of nothing, closing resets the connection in the middle of what the client sends
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionAbortedError
        return content

    def check_access(self, action: str, name: str | None):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if action in (*self.WRITING, "whoami") and not known:
            raise Refused(401, "Invalid username or password.")
        if name is not None and not known and self.server.store.is_private(name):
            raise Refused(401, "Repository not found", "RepoNotFound")

    def answer(self, status: int, content: bytes, **headers: str):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content, status: int = 200):
        self.answer(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def whoami(self):
        self.answer_json(
            {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}
        )

    def create_repository(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url, status = f"{self.server.endpoint}/{name}", 200
        try:
            self.server.store.create(name, wanted.get("visibility") == "private")
        except Refused as refused:
            status = refused.status
        self.answer_json({"url": url, "name": name, **({"error": "it is there"} if status != 200 else {})}, status)

    def validate_card(self):
        text = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            metadata = yaml.safe_load(head[1]) if head else {}
            problem = None if isinstance(metadata, dict) else "the metadata is no mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        errors = [{"message": problem}] if problem else []
        self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def information(self, name: str, revision: str = "main"):
        store = self.server.store
        files = [{"rfilename": path} for path in store.files(name, revision)]
        facts = {
            "id": name,
            "modelId": name,
            "private": store.is_private(name),
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self.answer_json({**facts, "sha": store.resolve(name, revision), "siblings": files})

    def references(self, name: str):
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in self.server.store.branches(name).items()
        ]
        self.answer_json({"branches": branches, "converts": [], "tags": []})

    @staticmethod
    def described(path: str, entry: dict) -> dict:
        large = {"lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 128}} if entry["large"] else {}
        return {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"], **large}

    def tree(self, name: str, revision: str, path: str = ""):
        prefix, found = f"{path}/" if path else "", {}
        for file, entry in self.server.store.files(name, revision).items():
            folder, _, rest = file.removeprefix(prefix).partition("/")
            if not file.startswith(prefix):
                continue
            if rest:
                found[prefix + folder] = {"type": "directory", "path": prefix + folder, "size": 0, "oid": "0" * 40}
            if not rest or self.query.get("recursive", ["false"])[0].lower() == "true":
                found[file] = self.described(file, entry)
        if path and not found:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self.answer_json(list(found.values()))

    def paths_information(self, name: str, revision: str):
        files = self.server.store.files(name, revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer_json([self.described(path, files[path]) for path in paths if path in files])

    def create_branch(self, name: str, branch: str):
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        # as Git would
        if ".." in branch:
            raise Refused(400, "Invalid rev id")
        self.server.store.create_branch(name, branch, start)
        self.answer_json({})

    def upload_modes(self, name: str, revision: str):
        present, answers = self.server.store.files(name, revision), []
        for file in json.loads(self.body)["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            large = path.endswith(LARGE_NAMES) or file["size"] > LARGE_SIZE or binary
            entry = present.get(path)
            oid = None if entry is None else entry["sha256" if entry["large"] else "oid"]
            answers.append(
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer_json({"files": answers})

    def large_batch(self, name: str):
        self.server.store.repository(name)
        answers, endpoint = [], self.server.endpoint
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not self.server.store.blob(item["oid"]).is_file():
                upload = {"href": f"{endpoint}/large/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{endpoint}/large/verify"}}
            answers.append(answer)
        self.answer_json({"transfer": "basic", "objects": answers})

    def large_upload(self, oid: str):
        if self.server.is_cut:
            raise Refused(403, "this address has expired")
        self.server.store.add_blob(self.body, expected=oid)
        self.answer(200, b"")

    def large_verify(self):
        item = json.loads(self.body)
        path = self.server.store.blob(item["oid"])
        if not path.is_file() or path.stat().st_size != item["size"]:
            raise Refused(404, f"there is no object {item['oid']} of {item['size']} bytes")
        self.answer_json({})

    def commit(self, name: str, revision: str):
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        sha = self.server.store.commit(name, revision, lines)
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, name: str, revision: str, path: str):
        store = self.server.store
        commit = store.resolve(name, revision)
        entry = store.files(name, commit).get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        content = store.blob(entry["sha256"]).read_bytes()
        etag = f'"{entry["sha256" if entry["large"] else "oid"]}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry["large"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry["size"])}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self.answer(200, content, **headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise Refused(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], **headers)


class HubServer(ThreadingHTTPServer):
    """
    The server, on a free port of this machine.

    Attributes:
        store ([`Store`]): all that was pushed.
        endpoint: what `HF_ENDPOINT` must be.
        requests: method and path of what was answered.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.requests = Store(folder), []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.cut_action, self.cut_after, self.is_cut = None, 0, False

    def allowance(self, action: str, length: int) -> int:
        """How many bytes of a body are read before the connection breaks."""
        with self.store.lock:
            if action != self.cut_action or self.is_cut:
                return length
            allowed = min(length, self.cut_after)
            self.cut_after -= allowed
            self.is_cut = allowed < length
            return allowed

    @contextmanager
    def cutting(self, action: str, after: int):
        """Breaks the connection once so many bytes of such requests have come; large uploads then get an error."""
        self.cut_action, self.cut_after, self.is_cut = action, after, False
        try:
            yield
        finally:
            self.cut_action, self.is_cut = None, False

    def handle_error(self, request, client_address):
        # a connection that broke, by us or by the client, is no error of the server
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


def run_client(server: HubServer, home: Path, *command, token: str | None = TOKEN, folder: Path | None = None):
    """Run Python in a process that knows no other Hub than the server, and nothing of this machine's settings for it.

    Args:
        server: the Hub.
        home: where the client caches.
        command: arguments of Python.
        token: the client's; none for a stranger.
        folder: where the process starts.
    """
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
    # without Xet, which needs servers of its own, the client sends large files by the LFS protocol
    environment |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return run_python(command, cwd=folder, env=environment)
