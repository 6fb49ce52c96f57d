"""A Hub on this machine: what huggingface_hub's client asks of huggingface.co, over real HTTP, kept in memory.

Repositories, branches and commits; preupload, LFS batch, upload and verification; commits as newline-delimited JSON; model info,
trees and files by revision, large ones by a redirect to another host with the real one's headers; validation of card metadata.
Faults are scheduled per route and strike the next matching requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.card_rules import card_problems

TOKEN = "hf_of_someone"
USER = "someone"
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """Strikes the next ``times`` requests whose method and path match: an HTTP error, or a connection cut in mid-body."""

    method: str
    path: str
    status: int = 0
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    times: int = 1
    skip: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.method != method or not re.search(self.path, path) or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """As git names it: of a large file its pointer's."""
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, Blob]] = {}
        self.titles: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        text = f"{len(self.commits)} {branch} {title} {sorted((path, blob.oid) for path, blob in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class FakeHub(ThreadingHTTPServer):
    """``with FakeHub() as hub: ... hub.url``. Requests are listed in ``hub.log`` as ``"METHOD /path [range]"``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        """The same server under another host's name, as large files live elsewhere than the Hub."""
        return f"http://localhost:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return {path: blob.content for path, blob in found.commits[found.resolve(revision)].items()}

    def publish(self, repo: str, folder: Path) -> None:
        """Put the files of a folder into a new repository of someone else."""
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        blobs = {name: Blob(path.read_bytes(), name.endswith(LFS_SUFFIXES)) for name, path in files.items()}
        self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        self.repos[repo] = Repo(private=False)
        self.repos[repo].commit("main", blobs, "upload")

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        super().__exit__(*args)


class Refusal(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        with self.server.lock:
            self.server.log.append(f"{self.command} {self.route} {self.headers.get('Range', '')}".strip())
            fault = next((f for f in self.server.faults if f.strikes(self.command, self.route)), None)
        try:
            self.cut = bool(fault and fault.cut and self.command == "GET")
            if fault and not self.cut:
                self.strike(fault)
                return
            for pattern, action in ROUTES[self.command]:
                if match := re.fullmatch(pattern, self.route):
                    action(self, **match.groupdict())
                    return
            raise Refusal(404, f"no route {self.command} {self.route}")
        except Refusal as refusal:
            self.read_body()
            headers = {"X-Error-Message": refusal.message} | {k.replace("_", "-"): v for k, v in refusal.headers.items()}
            self.send(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def strike(self, fault: Fault) -> None:
        if fault.cut:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.read_body()
        self.send(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message} | fault.headers)

    def read_body(self) -> bytes:
        if not hasattr(self, "_body") or self._body[0] is not self.headers:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._body = (self.headers, body)
        return self._body[1]

    def json_body(self) -> Any:
        return json.loads(self.read_body())

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.command != "HEAD":
            self.wfile.write(body)

    # Who asks

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_user(self) -> None:
        if not self.known:
            raise Refusal(401, "Invalid credentials in Authorization header")

    def repo(self, name: str, write: bool = False) -> Repo:
        if write:
            self.require_user()
            if name.split("/")[0] != USER:
                raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.known):
            raise Refusal(404 if self.known else 401, "Repository not found", X_Error_Code="RepoNotFound")
        return found

    def snapshot(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repo = self.repo(name)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return sha, repo.commits[sha]

    # Routes

    def whoami(self) -> None:
        self.require_user()
        self.send(200, {"type": "user", "name": USER, "fullname": "Some One", "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        self.require_user()
        asked = self.json_body()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name.split("/")[0] != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self.send(409, url | {"error": "You already created this model repo"})
            return
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send(200, url)

    def validate_yaml(self) -> None:
        problems = card_problems(self.json_body()["content"])
        self.send(400 if problems else 200, {"errors": [{"message": p} for p in problems], "warnings": []})

    def create_branch(self, repo: str, branch: str) -> None:
        found = self.repo(repo, write=True)
        if branch in found.branches:
            raise Refusal(409, "Reference already exists")
        start = self.json_body().get("startingPoint") or "main"
        found.branches[branch] = found.resolve(start)
        self.send(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        sha = found.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        answers = []
        for file in self.json_body()["files"]:
            old = found.commits[sha].get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = None if old is None else (old.sha256 if old.lfs else old.oid)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo, write=True)
        asked = self.json_body()
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            oid = item["oid"]
            actions = {
                "upload": {"href": f"{self.server.storage_url}/_storage/{oid}", "header": {}},
                "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/verify", "header": {}},
            }
            objects.append({"oid": oid, "size": item["size"]} | ({} if oid in self.server.objects else {"actions": actions}))
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        body = self.read_body()
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.server.objects[oid] = body
        self.send(200)

    def lfs_verify(self, repo: str) -> None:
        asked = self.json_body()
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(422, "no such object")
        self.send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        if revision not in found.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        files = dict(found.commits[found.branches[revision]])
        title = ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"the large file {value['path']} was never uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refusal(400, f"unknown operation {key}")
        sha = found.commit(revision, files, title)
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "hookOutput": ""})

    def model_info(self, repo: str, revision: str = "main") -> None:
        sha, files = self.snapshot(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.server.repos[repo].private
        fields = {"private": private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "spaces": []}
        self.send(200, {"_id": "0" * 24, "id": repo, "modelId": repo, "author": USER, "sha": sha, "siblings": siblings} | fields)

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self.snapshot(repo, revision)
        entries, folders = [], set()
        everything = self.query.get("recursive", [""])[0].lower() == "true"
        for path, blob in sorted(files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            below = path.removeprefix(f"{folder}/" if folder else "").split("/")
            if len(below) > 1 and not everything:
                folders.add("/".join(filter(None, (folder, below[0]))))
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            entries.append(entry)
        self.send(200, [*({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)), *entries])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.snapshot(repo, revision)
        if path not in files:
            raise Refusal(404, f"Entry not found: {path}", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            location = f"{self.server.storage_url}/_storage/{blob.sha256}"
            self.send(302, b"", headers | linked | {"Location": location, "ETag": f'"{blob.oid}"'})
        else:
            self.send_content(blob.content, headers | {"ETag": f'"{blob.oid}"'})

    def storage(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "a token was sent to the storage host")
        self.send_content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.send(200, content, headers)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        whole = f"bytes {start}-{end}/{len(content)}"
        self.send(206, content[start : end + 1], headers | {"Content-Range": whole})


API = rf"/api/(?:models|kernels)/{NAME}"
FILES = rf"/(?:kernels/)?{NAME}"
REVISION = r"(?P<revision>[^/]+)"
_READ = (
    (r"/api/whoami-v2", Handler.whoami),
    (rf"{API}/revision/{REVISION}", Handler.model_info),
    (rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    (API, Handler.model_info),
    (r"/_storage/(?P<oid>\w{64})", Handler.storage),
    (rf"{FILES}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
ROUTES = {
    "GET": _READ,
    "HEAD": _READ,
    "POST": (
        (r"/api/repos/create", Handler.create_repo),
        (r"/api/validate-yaml", Handler.validate_yaml),
        (rf"{API}/branch/(?P<branch>.+)", Handler.create_branch),
        (rf"{API}/preupload/{REVISION}", Handler.preupload),
        (rf"{API}/commit/{REVISION}", Handler.commit),
        (rf"{FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        (rf"{FILES}\.git/info/lfs/verify", Handler.lfs_verify),
    ),
    "PUT": ((r"/_storage/(?P<oid>\w{64})", Handler.lfs_upload),),
}
