"""A Civitai of our own on loopback: the by-hash endpoints as developer.civitai.com documents them, and faults on demand."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_HASHES = 100  # "Too many hashes" above it


@dataclass
class Fault:
    """What happens to the next ``times`` requests. ``kind``: status, reset, truncate, html, redirect, lie_about_length."""

    kind: str
    times: int = 1
    status: int = 429
    headers: dict[str, str] = field(default_factory=dict)


class CivitaiServer:
    """``versions`` are served; ``requests`` lists (method, path, hashes); ``seen_headers`` the headers of every request."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, list[str]]] = []
        self.seen_headers: list[dict[str, str]] = []
        self.faults: list[Fault] = []
        self.largest_batch = MOST_HASHES
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/api/v1"

    def fault(self, kind: str, times: int = 1, status: int = 429, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(kind, times, status, named))

    def take_fault(self) -> Fault | None:
        fault = next((fault for fault in self.faults if fault.times > 0), None)
        if fault is not None:
            fault.times -= 1
        return fault

    def add(self, sha256: str, number: int = 1, autov3: str = "", **changed: Any) -> dict[str, Any]:
        """Publish a version with one file; returns the document that is served."""
        version = {**version_of(sha256, number, autov3), **changed}
        self.versions.append(version)
        return version

    def by_sha256(self, wanted: list[str]) -> list[dict[str, Any]]:
        """One entry a matching file, newest first: not the order of the request."""
        hashes = {digest.upper() for digest in wanted}
        matching = [(version, file) for version in reversed(self.versions) for file in version.get("files", [])]
        return [version for version, file in matching if file["hashes"].get("SHA256") in hashes]

    def by_any(self, digest: str) -> dict[str, Any] | None:
        for version in self.versions:
            for file in version["files"]:
                if digest.upper() in file["hashes"].values():
                    return version
        return None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def version_of(sha256: str, number: int, autov3: str = "") -> dict[str, Any]:
    """A model version as the documentation shows it."""
    hashes = {"SHA256": sha256.upper(), "AutoV2": sha256[:10].upper(), "CRC32": "1A2B3C4D", "BLAKE3": "B3" * 32}
    if autov3:
        hashes["AutoV3"] = autov3.upper()
    return {
        "id": number,
        "modelId": 1000 + number,
        "name": f"v{number}.0",
        "baseModel": "SDXL 1.0",
        "baseModelType": "Standard",
        "air": f"urn:air:sdxl:lora:civitai:{1000 + number}@{number}",
        "status": "Published",
        "nsfwLevel": 1,
        "publishedAt": "2025-12-18T09:16:12.062Z",
        "trainedWords": [f"word {number}", "sks dog, "],
        "description": "<p>Use at <strong>0.8</strong></p><script>alert(1)</script>",
        "model": {
            "name": f"Style {number}",
            "type": "LORA",
            "nsfw": False,
            "poi": False,
            "description": '<p onclick="x()">A <a href="javascript:alert(1)">style</a></p>',
            "allowNoCredit": True,
            "allowCommercialUse": ["Image"],
            "allowDerivatives": False,
            "allowDifferentLicense": True,
        },
        "files": [
            {
                "id": 10 * number,
                "name": f"style{number}.safetensors",
                "type": "Model",
                "sizeKB": 6775430.35,
                "primary": True,
                "metadata": {"format": "SafeTensor", "fp": "fp16"},
                "hashes": hashes,
                "downloadUrl": f"https://civitai.com/api/download/models/{number}",
            }
        ],
        "images": [],
        "creator": {"username": "someone"},
        "stats": {"downloadCount": 1},
    }


class _Handler(BaseHTTPRequestHandler):
    owner: CivitaiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        digest = self.path.rpartition("/")[2]
        self._record([digest])
        if self._faulty():
            return
        version = self.owner.by_any(digest)
        self._json(200, version) if version else self._json(404, {"error": "Model not found"})

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._record(wanted)
        if self._faulty():
            return
        if len(wanted) > self.owner.largest_batch or any(len(digest) != 64 for digest in wanted):
            self._json(400, {"error": "Request must include an array of SHA256 Hashes. Too many hashes"})
        else:
            self._json(200, self.owner.by_sha256(wanted))

    def _record(self, hashes: list[str]) -> None:
        self.owner.requests.append((self.command, self.path, hashes))
        self.owner.seen_headers.append(dict(self.headers))

    def _faulty(self) -> bool:
        fault = self.owner.take_fault()
        if fault is not None:
            getattr(self, f"_{fault.kind}")(fault)
        return fault is not None

    def _status(self, fault: Fault) -> None:
        self._json(fault.status, {"error": "no"}, fault.headers)

    def _reset(self, _fault: Fault) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _truncate(self, _fault: Fault) -> None:
        body = json.dumps(self.owner.versions).encode()
        self._head(200, len(body), {"Connection": "close"})
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def _short(self, _fault: Fault) -> None:
        """Half of the answer, with a length that agrees."""
        body = json.dumps(self.owner.versions).encode()
        self._head(200, len(body) // 2)
        self.wfile.write(body[: len(body) // 2])

    def _html(self, fault: Fault) -> None:
        body = b"<html><title>Just a moment...</title></html>"
        self._head(200, len(body), {"Content-Type": "text/html", **fault.headers})
        self.wfile.write(body)

    def _redirect(self, fault: Fault) -> None:
        self._head(fault.status, 0, fault.headers)

    def _json(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self._head(status, len(body), {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def civitai_server() -> Iterator[CivitaiServer]:
    """A running server."""
    server = CivitaiServer()
    try:
        yield server
    finally:
        server.close()
