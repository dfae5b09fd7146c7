"""A Hugging Face Hub on the loopback: serves folders to its clients and keeps what they upload.

    python tests/fake_hub.py ROOT

ROOT/models/<owner>/<name>/... and ROOT/datasets/<owner>/<name>/... are served; a commit is added
to them and to ROOT/uploads/; every request is a line of ROOT/requests.log. The port is chosen by
the system and printed as the first line. Clients need HF_ENDPOINT=http://127.0.0.1:PORT, an empty
HF_HOME, and HF_HUB_DISABLE_XET=1. There is one revision, no access control and no git. While there
is a file ROOT/cut, uploads of more bytes than the number in it stay half-way.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

REPO = r"(?P<repo>[^/]+/[^/]+)"
LFS_SUFFIXES = (".safetensors", ".gguf")
LFS_SIZE = 10_000_000  # bytes from which any file goes through LFS


class Hub(ThreadingHTTPServer):
    """The server, with the folder it serves."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.log = (root / "requests.log").open("a", buffering=1, encoding="utf-8")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing on stderr: requests go to the log."""

    def do_GET(self) -> None:
        self.route(
            {
                r"/api/whoami-v2": self.whoami,
                rf"/api/(?P<kind>models|datasets)/{REPO}(?:/revision/[^/]+)?": self.repo_info,
                rf"/api/(?P<kind>models|datasets)/{REPO}/tree/[^/]+(?:/(?P<path>.*))?": self.tree,
                rf"/(?P<kind>datasets/)?{REPO}/resolve/[^/]+/(?P<path>.+)": self.download,
            }
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.route(
            {
                r"/api/repos/create": self.create_repo,
                r"/api/validate-yaml": self.validate_yaml,
                rf"/api/(?P<kind>models|datasets)/{REPO}/preupload/main": self.preupload,
                rf"/(?:datasets/)?{REPO}\.git/info/lfs/objects/batch": self.lfs_batch,
                rf"/api/(?P<kind>models|datasets)/{REPO}/commit/main": self.commit,
            }
        )

    def do_PUT(self) -> None:
        cut, size = self.server.root / "cut", int(self.headers.get("Content-Length", 0))
        if cut.exists() and size > int(cut.read_text()):
            self.rfile.read(size // 2)
            self.server.log.write(f"CUT {self.path}\n")
            self.rfile.read()  # until the client is gone
            self.close_connection = True
            return
        self.route({r"/lfs/(?P<oid>[0-9a-f]+)": self.lfs_upload})

    def route(self, routes: dict) -> None:
        path = unquote(urlparse(self.path).path)
        self.repo: Path | None = None
        self.body = self.read_body()
        authorised = "Authorization" in self.headers
        self.server.log.write(f"{self.command} {self.path} {len(self.body)} auth={authorised}\n")
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, path):
                return answer(**match.groupdict())
        return self.missing("RepoNotFound")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, value: object, status: int = 200, **headers: str) -> None:
        """Answer with bytes as they are, anything else as JSON. `_` in a header's name is `-`."""
        raw = isinstance(value, bytes)
        body = value if raw else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.repo:
            self.send_header("X-Repo-Commit", head(self.repo))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.send({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def folder(self, kind: str | None, repo: str) -> Path:
        folder = self.server.root / (kind or "models").rstrip("/") / repo
        self.repo = folder if folder.is_dir() else None
        return folder

    # Reading.

    def whoami(self) -> None:
        token = {"accessToken": {"role": "write"}}
        self.send({"type": "user", "name": "tester", "auth": token, "orgs": []})

    def repo_info(self, kind: str, repo: str) -> None:
        folder = self.folder(kind, repo)
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files(folder)]
        return self.send(
            {
                "id": repo,
                "sha": head(folder),
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": siblings,
            }
        )

    def tree(self, kind: str, repo: str, path: str | None) -> None:
        folder = self.folder(kind, repo)
        below = folder / (path or "")
        if not below.is_dir():
            return self.missing("EntryNotFound")
        return self.send(
            [
                {
                    "type": "file",
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    "size": file.stat().st_size,
                    "path": str(file.relative_to(folder)),
                }
                for file in files(below)
            ]
        )

    def download(self, kind: str | None, repo: str, path: str) -> None:
        folder = self.folder(kind, repo)
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        if not (folder / path).is_file():
            return self.missing("EntryNotFound")
        data = (folder / path).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "GET" and wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(data[first : last + 1], 206, **headers)
        return self.send(data, **headers)

    # Writing.

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        kind = "datasets" if asked.get("type") == "dataset" else "models"
        self.folder(kind, repo).mkdir(parents=True, exist_ok=True)
        self.send({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def validate_yaml(self) -> None:
        self.send({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str) -> None:
        def mode(file: dict) -> str:
            big = file.get("size", 0) > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
            return "lfs" if big else "regular"

        asked = json.loads(self.body)["files"]
        self.send(
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False}
                    for file in asked
                ]
            }
        )

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.server.root / "uploads" / "lfs" / item["oid"]).is_file():
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        write(self.server.root / "uploads" / "lfs" / oid, self.body)
        self.send({})

    def commit(self, kind: str, repo: str) -> None:
        folder, contents = self.folder(kind, repo), {}
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                stored = self.server.root / "uploads" / "lfs" / value["oid"]
                contents[value["path"]] = stored.read_bytes()
            elif operation["key"] == "deletedFile":
                contents[value["path"]] = None
            elif value.get("parentCommit", head(folder)) != head(folder):
                return self.send({"error": "A commit has happened since."}, 412)
        for path, data in contents.items():
            if data is None:
                (folder / path).unlink()
            else:
                write(self.server.root / "uploads" / kind / repo / path, data)
                write(folder / path, data)
        commit = head(folder)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self.send({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def head(folder: Path) -> str:
    """The commit that a repository is at: a digest of its files."""
    digest = hashlib.sha1()
    for path in files(folder):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]))
    print(hub.server_port, flush=True)
    hub.serve_forever()
