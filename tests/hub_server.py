"""A Hugging Face Hub on loopback: what of its HTTP protocol uploading, downloading and looking need, in memory."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES = []


class Refusal(Exception):
    def __init__(self, status, message, code=None, **headers):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Repo:
    private: bool
    refs: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)  # the branch of every pull request
    commits: dict = field(default_factory=dict)  # files by commit; a file is bytes, or the digest of a large one

    def commit(self, ref, files):
        content = json.dumps([ref, len(self.commits), sorted(files)]).encode()
        oid = hashlib.sha1(content).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


def route(method, pattern):
    def register(handle):
        ROUTES.append((method, re.compile(pattern + r"\Z"), handle))
        return handle

    return register


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub:` serves it at `hub.url`.

    Attributes:
        tokens: Namespaces that a token may write to.
        large: Large files by SHA-256, uploaded whether or not they were committed.
        asked: How often every method and kind of address was asked for.
        faults: What is to go wrong, by kind: the number of times that it still will.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_writer": ["timm-ulsam", "writer"], "hf_reader": []}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked, self.faults = Counter(), Counter()
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fails(self, kind):
        with self.lock:
            self.faults[kind] -= 1
            return self.faults[kind] >= 0

    def put(self, repo, folder):
        """Have a repository with the files of a folder."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        for path, content in files.items():
            if path.endswith(".safetensors"):
                files[path] = hashlib.sha256(content).hexdigest()
                self.large[files[path]] = content
        self.repos[repo] = Repo(private=False)
        self.repos[repo].commit("main", files)

    def files(self, repo, revision="main"):
        """Content of every file of a repository."""
        files = self.repos[repo].resolve(revision)[1]
        return {path: self.large[f] if isinstance(f, str) else f for path, f in files.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _answer(self):
        hub, address = self.server, urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self._read()
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        try:
            if self.token and self.token not in hub.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, handle in ROUTES:
                if method in (self.command, "*") and (match := pattern.match(address.path)):
                    with hub.lock:
                        hub.asked[f"{self.command} {handle.__name__}"] += 1
                    answer = handle(self, hub, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    if answer is not None:
                        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                    return
            raise Refusal(404, f"Sorry, we can't find {self.command} {address.path}")
        except Refusal as refusal:
            body = json.dumps({"error": refusal.message}).encode()
            self.send(refusal.status, body, {"Content-Type": "application/json", **refusal.headers})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status, body, headers, length=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repo(self, hub, repo, write=False):
        namespaces = hub.tokens.get(self.token)
        found = hub.repos.get(repo)
        mine = namespaces is not None and repo.split("/")[0] in namespaces
        if found is None or (found.private and not mine):
            if namespaces is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and namespaces is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not mine:
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return found


@route("GET", "/api/whoami-v2")
def whoami(request, hub):
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"name": name} for name in hub.tokens[request.token]]
    return {"type": "user", "name": request.token.removeprefix("hf_"), "orgs": orgs}


@route("POST", "/api/repos/create")
def create(request, hub):
    asked = json.loads(request.body)
    org, name = asked["organization"], asked["name"]
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    if org not in hub.tokens[request.token]:
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{org}"')
    if f"{org}/{name}" in hub.repos:
        raise Refusal(409, "You already created this model repo")
    # older clients say private, newer ones visibility
    repo = hub.repos[f"{org}/{name}"] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
    repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    return {"url": f"{hub.url}/{org}/{name}", "name": f"{org}/{name}"}


@route("POST", "/api/validate-yaml")
def validate(request, hub):
    content = json.loads(request.body)["content"]
    if not content.startswith("---\n"):
        raise Refusal(400, "empty or missing yaml metadata in repo card")
    return {"errors": [], "warnings": []}


@route("GET", MODEL + r"(?:/revision/(?P<revision>[^/]+))?")
def info(request, hub, repo, revision="main"):
    found = request.repo(hub, repo)
    oid, files = found.resolve(revision or "main")
    return {
        "_id": "0",
        "id": repo,
        "modelId": repo,
        "private": found.private,
        "sha": oid,
        "tags": [],
        "siblings": [{"rfilename": path} for path in files],
    }


@route("GET", MODEL + r"/tree/(?P<revision>[^/]+)(?:/.*)?")
def tree(request, hub, repo, revision):
    return [_entry(hub, *item) for item in request.repo(hub, repo).resolve(revision)[1].items()]


def _entry(hub, path, file):
    if isinstance(file, bytes):
        return {"type": "file", "path": path, "size": len(file), "oid": _git_digest(file)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file}\nsize {len(hub.large[file])}\n".encode()
    lfs = {"oid": file, "size": len(hub.large[file]), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": lfs["size"], "oid": _git_digest(pointer), "lfs": lfs}


def _git_digest(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@route("POST", MODEL + r"/branch/(?P<branch>[^/]+)")
def branch(request, hub, repo, branch):
    found = request.repo(hub, repo, write=True)
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    if branch in found.refs:
        raise Refusal(409, f"Reference already exists: {branch}")
    found.refs[branch] = found.refs["main"]
    return {}


@route("GET", MODEL + "/discussions")
def discussions(request, hub, repo):
    found = [_discussion(repo, number) for number in request.repo(hub, repo).targets]
    return {"discussions": found, "count": len(found), "start": 0}


@route("GET", MODEL + r"/discussions/(?P<number>\d+)")
def discussion(request, hub, repo, number):
    target = request.repo(hub, repo).targets[int(number)]
    changes = {"base": f"refs/heads/{target}", "mergeCommitId": None}
    return {**_discussion(repo, int(number)), "changes": changes, "filesWithConflicts": [], "events": [], "diff": ""}


def _discussion(repo, number):
    return {
        "num": number,
        "title": "Publish",
        "author": {"name": "writer"},
        "createdAt": "2026-01-01T00:00:00.000Z",
        "status": "open",
        "repo": {"name": repo, "type": "model"},
        "isPullRequest": True,
    }


@route("POST", MODEL + r"/preupload/(?P<revision>[^/]+)")
def preupload(request, hub, repo, revision):
    _, files = request.repo(hub, repo, write="create_pr" not in request.query).resolve(revision)
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _entry(hub, file["path"], files[file["path"]])["oid"] if file["path"] in files else None,
            }
            for file in json.loads(request.body)["files"]
        ]
    }


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def batch(request, hub, repo):
    request.repo(hub, repo)
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    objects = []
    for asked in json.loads(request.body)["objects"]:
        upload = {"upload": {"href": f"http://localhost:{hub.server_port}/storage/{asked['oid']}"}}
        objects.append({**asked, **({} if asked["oid"] in hub.large else {"actions": upload})})
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/storage/(?P<digest>[0-9a-f]{64})")
def upload(request, hub, digest):
    if request.token is not None:
        raise Refusal(400, "Only one auth mechanism allowed")  # a signed address: no token may come here
    if hub.fails("refuse upload"):
        raise Refusal(403, "Request has expired")
    if hashlib.sha256(request.body).hexdigest() != digest:
        raise Refusal(400, "The SHA256 you specified did not match what we received")
    hub.large[digest] = request.body
    return {}


@route("POST", MODEL + r"/commit/(?P<revision>[^/]+)")
def commit(request, hub, repo, revision):
    as_pr = "create_pr" in request.query
    found = request.repo(hub, repo, write=not as_pr)
    if hub.fails("drop commit"):
        raise ConnectionResetError
    oid, files = found.resolve(revision)
    files = dict(files)
    for line in request.body.splitlines():
        item = json.loads(line)
        kind, value = item["key"], item["value"]
        if kind == "header" and value.get("parentCommit") not in (None, oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if kind == "file":
            files[value["path"]] = base64.b64decode(value["content"]) + b"?" * hub.fails("alter commit")
        elif kind == "lfsFile":
            if value["oid"] not in hub.large:
                raise Refusal(400, "LFS pointer pointed to a file that does not exist")
            files[value["path"]] = value["oid"]
        elif kind == "deletedFile":
            del files[value["path"]]
    ref = f"refs/pr/{1 + len(found.targets)}" if as_pr else revision
    oid = found.commit(ref, files)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"}
    if as_pr:
        found.targets[1 + len(found.targets)] = revision
        answer["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/{ref.rpartition('/')[2]}"
    return answer


@route("*", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request, hub, repo, revision, path):
    oid, files = request.repo(hub, repo).resolve(revision)
    if path not in files:
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
    file, headers = files[path], {"X-Repo-Commit": oid}
    if isinstance(file, bytes):
        request.send(200, file, {**headers, "ETag": f'"{_git_digest(file)}"'})
    else:
        # large files are elsewhere, on a host that is not the Hub's
        linked = {"X-Linked-Size": len(hub.large[file]), "X-Linked-ETag": f'"{file}"'}
        request.send(302, b"", {**headers, **linked, "Location": f"http://localhost:{hub.server_port}/storage/{file}"})


@route("GET", r"/storage/(?P<digest>[0-9a-f]{64})")
def download(request, hub, digest):
    content, status, headers = hub.large[digest], 200, {"Accept-Ranges": "bytes", "ETag": f'"{digest}"'}
    if asked := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content, status = content[start:], 206
    half = content[: len(content) // 2]
    if hub.fails("drop download"):  # the connection is lost half-way
        request.close_connection = True
        return request.send(status, half, headers, length=len(content))
    if hub.fails("short download"):  # a proxy ends it half-way, in good order
        return request.send(200, half, {})
    if hub.fails("flip download"):
        content = content[:-1] + bytes([content[-1] ^ 1])
    return request.send(status, content, headers)
