"""Hubs of our own on 127.0.0.1, which speak as much of the real ones' API as fetching needs."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repositories of a fake hub and what it was asked.

    Attributes:
        repositories: ``ORG/NAME`` to the directory that it serves.
        gated: names that only members may see.
        broken: file names that are refused.
        cut: file names whose next transfer breaks off half-way.
        asked: method and path of every request.
        ranges: the ranges of bytes that were asked for.
        revisions: what Hugging Face's repositories can be asked for.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=lambda: {"", "main", COMMIT})
    url: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        paths = [unquote(a.removeprefix("GET ")) for a in self.asked if a.startswith("GET ")]
        return [p.split("/resolve/")[1].split("/", 1)[1] for p in paths if "/resolve/" in p]


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def reply_file(self, path: Path, **headers: str) -> None:
        body = path.read_bytes()
        digest = hashlib.sha256(body).hexdigest()
        start = 0
        if given := self.headers.get("Range"):
            self.hub.ranges.append(given)
            start = int(given.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        headers["ETag"] = f'"{digest}"'
        if path.name in self.hub.cut and self.command == "GET":
            self.hub.cut.remove(path.name)
            self.break_off(body, **headers)
        else:
            self.reply(206 if start else 200, body[start:], **headers)

    def break_off(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.answer(urlsplit(self.path).path, parse_qs(urlsplit(self.path).query))

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def files(self, repository: str) -> dict[str, Path]:
        root = self.hub.repositories[repository]
        found = sorted(p for p in root.rglob("*") if p.is_file())
        return {p.relative_to(root).as_posix(): p for p in found}


class _HuggingFace(_Handler):
    """``/api/models/...`` and ``/ORG/NAME/resolve/...``."""

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        parts = [unquote(p) for p in path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        if api:
            parts = parts[2:]
        if parts[0] == "datasets":
            parts = parts[1:]
        repository = "/".join(parts[:2])
        action, revision, *rest = [*parts[2:], "", "main"][: max(len(parts) - 2, 2)]
        if repository not in self.hub.repositories:
            return self.reply_json({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        if repository in self.hub.gated:
            return self.reply_json({"error": "no"}, 403, X_Error_Code="GatedRepo")
        if revision not in self.hub.revisions:
            return self.reply_json({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        if api and action == "tree":
            return self.reply_json([self.entry(*row) for row in self.files(repository).items()])
        if api:
            siblings = [
                {"rfilename": n, "size": p.stat().st_size}
                for n, p in self.files(repository).items()
            ]
            return self.reply_json({"id": repository, "sha": COMMIT, "siblings": siblings})
        file = "/".join(rest)
        if file in self.hub.broken:
            return self.reply_json({"error": "no"}, 404, X_Error_Code="EntryNotFound")
        return self.reply_file(self.files(repository)[file], X_Repo_Commit=COMMIT)

    @staticmethod
    def entry(name: str, path: Path) -> dict[str, Any]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


class _ModelScope(_Handler):
    """``/api/v1/models/ORG/NAME/repo/files`` and ``.../repo?FilePath=``.

    Of data sets, ``/api/v1/datasets/ORG/NAME/repo/tree`` lists the files.
    """

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        parts = path.strip("/").split("/")
        repository = "/".join(parts[3:5])
        missing = {"Code": 10010205001, "Message": "not found", "Success": False}
        revision = query.get("Revision", ["master"])[0]
        if repository not in self.hub.repositories or revision != "master":
            return self.reply_json(missing, 404)
        if repository in self.hub.gated:
            return self.reply_json({"Code": 403, "Message": "no access", "Success": False}, 403)
        files = self.files(repository)
        if parts[5:] in (["repo", "files"], ["repo", "tree"]):
            rows = [self.entry(*row) for row in files.items()]
            return self.reply_json({"Code": 200, "Success": True, "Data": {"Files": rows}})
        if parts[5:] == ["repo"]:
            return self.reply_file(files[query["FilePath"][0]])
        return self.reply_json({"Code": 200, "Success": True, "Data": {"Name": repository}})

    @staticmethod
    def entry(name: str, path: Path) -> dict[str, Any]:
        return {
            "Path": name,
            "Name": path.name,
            "Type": "blob",
            "Size": path.stat().st_size,
            "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


@contextlib.contextmanager
def serving(kind: str) -> Iterator[Hub]:
    """Serve an empty hub, ``huggingface`` or ``modelscope``, until the block ends."""
    hub = Hub()
    base = {"huggingface": _HuggingFace, "modelscope": _ModelScope}[kind]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (base,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
