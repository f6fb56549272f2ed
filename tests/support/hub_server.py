# ruff: noqa: B904, BLE001, C901, N815, PERF401, PLR0912, PLR0915, PLR0917, PLW2901, SIM115, UP031  (one file, terse on purpose)
"""An offline stand-in for the Hugging Face Hub: enough of its HTTP protocol for huggingface_hub 2.4 and the `hf`
CLI to create repos, commit, open and merge PRs, list, download, range-read and xet-upload, plus faults on demand.

Standard library only (PyYAML is used for README metadata when importable, `lz4` to unpack xet chunks quickly).
Written from huggingface_hub's client source, the public Hub docs and the public Xet protocol specification.

    python tests/support/hub_server.py --port 8089 --data hubdata
    HF_ENDPOINT=http://127.0.0.1:8089 HF_TOKEN=hf_testtoken hf upload tester/my-lora ./folder .

In-process:   with Hub(data_dir) as hub:  HfApi(endpoint=hub.url, token="hf_testtoken")...; hub.fault(...); hub.log()
"""

import argparse
import base64
import binascii
import fnmatch
import gzip
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

try:
    import yaml
except ImportError:  # metadata is then not validated or indexed
    yaml = None

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
LFS_PATTERNS = [
    "*.7z",
    "*.arrow",
    "*.bin",
    "*.bz2",
    "*.ckpt",
    "*.ftz",
    "*.gz",
    "*.h5",
    "*.joblib",
    "*.lfs.*",
    "*.mlmodel",
    "*.model",
    "*.msgpack",
    "*.npy",
    "*.npz",
    "*.onnx",
    "*.ot",
    "*.parquet",
    "*.pb",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.rar",
    "*.safetensors",
    "saved_model/**/*",
    "*.tar.*",
    "*.tar",
    "*.tflite",
    "*.tgz",
    "*.wasm",
    "*.xz",
    "*.zip",
    "*.zst",
    "*tfevents*",
]
GITATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS).encode()
LICENSES = {
    "apache-2.0",
    "mit",
    "openrail",
    "bigscience-openrail-m",
    "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m",
    "afl-3.0",
    "artistic-2.0",
    "bsl-1.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsd-3-clause-clear",
    "c-uda",
    "cc",
    "cc0-1.0",
    "cc-by-2.0",
    "cc-by-2.5",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-2.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "wtfpl",
    "ecl-2.0",
    "epl-1.0",
    "epl-2.0",
    "etalab-2.0",
    "eupl-1.1",
    "eupl-1.2",
    "agpl-3.0",
    "gfdl",
    "gpl",
    "gpl-2.0",
    "gpl-3.0",
    "lgpl",
    "lgpl-2.1",
    "lgpl-3.0",
    "isc",
    "h-research",
    "intel-research",
    "lppl-1.3c",
    "ms-pl",
    "apple-ascl",
    "apple-amlr",
    "mpl-2.0",
    "odc-by",
    "odbl",
    "openmdw-1.0",
    "openmdw-1.1",
    "openrail++",
    "osl-3.0",
    "postgresql",
    "ofl-1.1",
    "ncsa",
    "unlicense",
    "zlib",
    "pddl",
    "lgpl-lr",
    "deepfloyd-if-license",
    "fair-noncommercial-research-license",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "llama4",
    "grok2-community",
    "gemma",
    "unknown",
    "other",
}
BIG = 10 * 1024 * 1024  # files above this are always stored as LFS


def sha1(b):
    return hashlib.sha1(b).hexdigest()


def sha256(b):
    return hashlib.sha256(b).hexdigest()


def git_oid(kind, data):
    return sha1(kind + b" %d\0" % len(data) + data)


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + "%03dZ" % (time.time() % 1 * 1000)


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, body=None):
        self.status, self.message, self.code, self.headers, self.body = status, message, code, headers or {}, body


def pointer(sha, size):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()


def tree_ids(files):
    """git tree id of every folder ('' = root) for a flat {path: entry} map."""
    root, out = {}, {}
    for path, e in files.items():
        d = root
        *dirs, name = path.split("/")
        for part in dirs:
            d = d.setdefault(part, {})
            if "oid" in d and not isinstance(d.get("oid"), dict):
                raise HubError(400, f"'{path}': a parent is a file")
        d[name] = e["oid"]

    def walk(d, prefix):
        rows = []
        for name, v in d.items():
            is_dir = isinstance(v, dict)
            oid = walk(v, prefix + name + "/") if is_dir else v
            rows.append(
                (
                    name + "/" if is_dir else name,
                    (b"40000 " if is_dir else b"100644 ") + name.encode() + b"\0" + bytes.fromhex(oid),
                )
            )
        oid = git_oid(b"tree", b"".join(r for _, r in sorted(rows)))
        out[prefix.rstrip("/")] = oid
        return oid

    walk(root, "")
    return out


def slice_of(file, a, b):
    with open(file, "rb") as h:
        return h.read()[a:b]


def front_matter(text):
    m = re.match(r"^\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    return m.group(1) if m else None


# ------------------------------------------------------------------------------------------------------------ store
class Store:
    def __init__(self, root):
        self.root, self.lock = root, threading.RLock()
        for d in ("blob", "lfs", "tmp", "xorb"):
            os.makedirs(os.path.join(root, d), exist_ok=True)
        self.repos, self.moved, self.xet = {}, {}, {"files": {}, "by_sha": {}, "xorbs": {}}
        f = os.path.join(root, "state.json")
        if os.path.exists(f):
            with open(f) as h:
                s = json.load(h)
            self.repos = {tuple(k.split(":", 1)): v for k, v in s["repos"].items()}
            self.moved = {tuple(k.split(":", 1)): v for k, v in s["moved"].items()}
            self.xet = s["xet"]

    def save(self):
        with self.lock:
            self._save()

    def _save(self):
        f = os.path.join(self.root, "state.json")
        s = {
            "repos": {":".join(k): v for k, v in self.repos.items()},
            "moved": {":".join(k): v for k, v in self.moved.items()},
            "xet": self.xet,
        }
        with open(f + ".tmp", "w") as h:
            json.dump(s, h)
        os.replace(f + ".tmp", f)

    def path(self, kind, oid):
        return os.path.join(self.root, kind, oid)

    def put_blob(self, data):
        oid = git_oid(b"blob", data)
        if not os.path.exists(self.path("blob", oid)):
            t = self.path("tmp", secrets.token_hex(8))
            with open(t, "wb") as h:
                h.write(data)
            os.replace(t, self.path("blob", oid))
        return {"oid": oid, "size": len(data)}

    def lfs_entry(self, sha, size):
        return {
            "oid": git_oid(b"blob", pointer(sha, size)),
            "size": size,
            "sha256": sha,
            "pointer": len(pointer(sha, size)),
        }

    def file_of(self, entry):
        return self.path("lfs", entry["sha256"]) if "sha256" in entry else self.path("blob", entry["oid"])

    def read(self, entry):
        with open(self.file_of(entry), "rb") as h:
            return h.read()

    def new_repo(self, kind, rid, user, private=False, extra=None):
        r = {
            "type": kind,
            "id": rid,
            "private": private,
            "gated": False,
            "created": now(),
            "branches": {},
            "tags": {},
            "prs": {},
            "talks": [],
            "commits": {},
            "lfs": {},
            "author": rid.split("/")[0],
            "access": [],
            "_id": secrets.token_hex(12),
            **(extra or {}),
        }
        self.repos[(kind, rid)] = r
        self.commit(r, "main", {".gitattributes": self.put_blob(GITATTRIBUTES)}, "initial commit", "", user, [])
        return r

    def commit(self, r, branch, files, title, message, user, parents, ref="branches"):
        body = (
            f"tree {tree_ids(files)['']}\n"
            + "".join(f"parent {p}\n" for p in parents)
            + f"author {user} <{user}@example.org> {int(time.time())} +0000\n\n{title}\n\n{message}\n{secrets.token_hex(4) if title == 'initial commit' else len(r['commits'])}"
        ).encode()
        oid = git_oid(b"commit", body)
        r["commits"][oid] = {
            "oid": oid,
            "parents": parents,
            "files": files,
            "title": title,
            "message": message,
            "author": user,
            "date": now(),
        }
        if branch is not None:
            r[ref][branch] = oid
        r["modified"] = now()
        self.save()
        return oid

    def history(self, r, oid):
        """newest first, every reachable commit once"""
        seen, order, todo = set(), [], [oid]
        while todo:
            o = todo.pop(0)
            if o in seen:
                continue
            seen.add(o)
            order.append(r["commits"][o])
            todo += r["commits"][o]["parents"]
        return order

    def last_touch(self, r, head, path):
        cur = r["commits"][head]

        def pick(c):
            return {k: v["oid"] for k, v in c["files"].items() if k == path or k.startswith(path + "/")}

        while cur["parents"] and pick(r["commits"][cur["parents"][0]]) == pick(cur):
            cur = r["commits"][cur["parents"][0]]
        return {"id": cur["oid"], "title": cur["title"], "date": cur["date"]}


# --------------------------------------------------------------------------------------------------------- xet codec
def hash_str(b):  # spec: each 8 byte group is a little endian integer
    return "".join(f"{x:016x}" for x in struct.unpack("<4Q", b))


def lz4_frame(data):
    try:
        import lz4.frame

        return lz4.frame.decompress(data)
    except ImportError:
        pass
    flg, pos = data[4], 7 + (8 if data[4] & 8 else 0)
    out = bytearray()
    while True:
        (n,) = struct.unpack_from("<I", data, pos)
        pos += 4
        if n == 0:
            return bytes(out)
        raw, n = n >> 31, n & 0x7FFFFFFF
        blk, pos = data[pos : pos + n], pos + n + (4 if flg & 16 else 0)
        if raw:
            out += blk
            continue
        i = 0
        while i < len(blk):
            tok = blk[i]
            i += 1
            lit = tok >> 4
            if lit == 15:
                while True:
                    b = blk[i]
                    i += 1
                    lit += b
                    if b != 255:
                        break
            out += blk[i : i + lit]
            i += lit
            if i >= len(blk):
                break
            off = blk[i] | blk[i + 1] << 8
            i += 2
            ml = (tok & 15) + 4
            if ml == 19:
                while True:
                    b = blk[i]
                    i += 1
                    ml += b
                    if b != 255:
                        break
            s = len(out) - off
            if off >= ml:
                out += out[s : s + ml]
            else:
                for k in range(ml):
                    out.append(out[s + k])


def ungroup4(d):
    n, out = len(d), bytearray(len(d))
    pos = 0
    for g in range(4):
        k = (n - g + 3) // 4
        out[g::4] = d[pos : pos + k]
        pos += k
    return bytes(out)


def xorb_chunks(data):
    """[(start, end, scheme, unpacked)] of a serialized xorb; stops at a footer."""
    rows, pos = [], 0
    while pos + 8 <= len(data) and data[pos] == 0:
        c, u = int.from_bytes(data[pos + 1 : pos + 4], "little"), int.from_bytes(data[pos + 5 : pos + 8], "little")
        if pos + 8 + c > len(data) or data[pos + 4] > 2 or not 0 < u <= 1 << 20:
            break
        rows.append((pos, pos + 8 + c, data[pos + 4], u))
        pos += 8 + c
    return rows


def unpack_chunk(data, row):
    s, e, scheme, n = row
    raw = data[s + 8 : e]
    out = raw if scheme == 0 else lz4_frame(raw) if scheme == 1 else ungroup4(lz4_frame(raw))
    if len(out) != n:
        raise ValueError("chunk unpacks to the wrong length")
    return out


def parse_shard(b):
    """[(file hash, sha256 or None, [(xorb, unpacked, start, end)])]"""
    pos, files = 48, []
    while b[pos : pos + 32] != b"\xff" * 32:
        h, flags, n = b[pos : pos + 32], *struct.unpack_from("<II", b, pos + 32)
        pos += 48
        terms = []
        for _ in range(n):
            _, u, s, e = struct.unpack_from("<4I", b, pos + 32)
            terms.append((hash_str(b[pos : pos + 32]), u, s, e))
            pos += 48
        if flags & 1 << 31:
            pos += 48 * n
        sha = None
        if flags & 1 << 30:
            # the sha256 is carried as four little endian words, like the other hashes
            sha, pos = hash_str(b[pos : pos + 32]), pos + 48
        files.append((hash_str(h), sha, terms))
    return files


# ----------------------------------------------------------------------------------------------------------- handler
class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, server_version = "HTTP/1.1", True, "hubstub/1"
    timeout = 120

    hub = property(lambda s: s.server.hub)
    store = property(lambda s: s.server.hub.store)

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- request plumbing
    def body_stream(self):
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            while True:
                n = int(self.rfile.readline().split(b";")[0], 16)
                if n == 0:
                    while self.rfile.readline().strip():
                        pass
                    break
                yield self.rfile.read(n)
                self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left > 0:
                b = self.rfile.read(min(left, 1 << 20))
                if not b:
                    raise ConnectionError("client went away")
                left -= len(b)
                yield b
        self.body_done = True

    def body(self):
        if self._body is None:
            self._body = b"".join(self.body_stream())
        return self._body

    def json(self):
        try:
            return json.loads(self.body() or b"{}")
        except ValueError:
            raise HubError(400, "Invalid JSON body")

    def q(self, name, default=None):
        v = self.query.get(name)
        return v[-1] if v else default

    def handle_one(self):
        u = urlsplit(self.path)
        self.upath, self.query, self._body, self.body_done = (
            u.path,
            parse_qs(u.query, keep_blank_values=True),
            None,
            False,
        )
        self.status, self.sent, self.fault, self.user, self.role, self.bad_token = 0, 0, None, None, None, False
        self.rec = {
            "t": round(time.time(), 3),
            "via": self.server.role,
            "method": self.command,
            "path": u.path,
            "query": u.query,
            "auth": bool(self.headers.get("Authorization")),
            "range": self.headers.get("Range"),
            "if_range": self.headers.get("If-Range"),
            "ua": (self.headers.get("User-Agent") or "")[:80],
        }
        self.hub.busy += 0 if u.path.startswith("/_admin/") else 1
        try:
            if u.path.startswith("/_admin/"):
                return self.admin()
            self.fault = self.hub.pick_fault(self.command, u.path, self.headers.get("Range"))
            if self.fault and self.pre_fault():
                return None
            if self.server.role == "cdn" or (u.path.startswith("/_storage/") and self.hub.cdn_port is None):
                self.cdn()
            else:
                self.authenticate()
                self.route()
        except HubError as e:
            self.error(e)
        except (ConnectionError, BrokenPipeError, TimeoutError):
            self.close_connection = True
        except Exception as e:
            import traceback

            traceback.print_exc()
            try:
                self.error(HubError(500, f"{type(e).__name__}: {e}"))
            except Exception:
                self.close_connection = True
        finally:
            if not u.path.startswith("/_admin/"):
                self.rec.update(
                    status=self.status, sent=self.sent, user=self.user, fault=self.fault and self.fault["kind"]
                )
                self.hub.record(self.rec)
                self.hub.busy -= 1
            if not self.body_done and (self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding")):
                try:
                    if (
                        int(self.headers.get("Content-Length") or 1 << 30) < 64 << 20
                        and self._body is None
                        and not self.close_connection
                    ):
                        self.body()
                    elif self._body is None:
                        self.close_connection = True
                except Exception:
                    self.close_connection = True

    def abort(self):
        """reset the TCP connection"""
        try:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        except OSError:
            pass
        self.close_connection, self.body_done = True, True

    def pre_fault(self):
        """True when the fault answered the request"""
        f, k = self.fault, self.fault["kind"]
        if k == "status":
            self.body()
            self.send(
                f.get("status", 500),
                json.dumps(f.get("json", {"error": f.get("message", "Internal Server Error")})).encode()
                if "body" not in f
                else f["body"].encode(),
                {"Content-Type": f.get("type", "application/json"), **f.get("headers", {})},
            )
            return True
        if k == "ratelimit":
            self.body()
            t = f.get("reset", 1)
            self.send(
                429,
                b'{"error":"Rate limited"}',
                {
                    "Content-Type": "application/json",
                    "ratelimit": f'"{f.get("bucket", "api")}";r=0;t={t}',
                    "ratelimit-policy": f'"fixed window";"{f.get("bucket", "api")}";q=500;w=300',
                },
            )
            return True
        if k == "delay":
            time.sleep(f.get("seconds", 1))
        if k == "hang":
            time.sleep(f.get("seconds", 30))
            self.abort()
            return True
        if k == "reset":
            self.abort()
            return True
        if k == "html":
            self.body()
            self.send(
                f.get("status", 200), b"<html><title>Sign in to network</title></html>", {"Content-Type": "text/html"}
            )
            return True
        if k == "race":
            m = re.match(r"^/api/(models|datasets|spaces|kernels)/([^/]+/[^/]+)/commit/(.+)$", self.upath)
            if m:
                with self.store.lock:
                    r, b = self.store.repos.get((TYPES[m[1]], m[2])), unquote(m[3])
                    if r and b in r["branches"]:
                        head = r["branches"][b]
                        name = f.get("file", "race.txt")
                        files = {
                            **r["commits"][head]["files"],
                            name: self.store.put_blob(f.get("content", f"raced at {now()}").encode()),
                        }
                        self.store.commit(r, b, files, "a competing commit", "", "rival", [head])
        return False

    # -- responses
    def send(self, status, body=b"", headers=None, file=None, rng=None):
        """body bytes, or (file, (start, end)) streamed. Applies body faults."""
        f, k = self.fault or {}, (self.fault or {}).get("kind")
        h = {"Date": self.date_time_string(), "X-Request-Id": secrets.token_hex(8), **(headers or {})}
        a, b = rng if rng else (0, len(body))
        length = b - a
        if k == "short":
            length = max(0, length - f.get("bytes", 1))
        if k == "drop_headers":
            low = [x.lower() for x in f["names"]]
            h = {x: v for x, v in h.items() if x.lower() not in low}
        if k == "set_headers":
            h.update(f["headers"])
        if k == "gzip" and self.command == "GET" and status in (200, 206):
            data = body if file is None else slice_of(file, a, b)
            h.pop("Accept-Ranges", None)
            body, file, a, b = gzip.compress(data), None, 0, 0
            b = length = len(body)
            h.update({"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"})
        if k == "lost_response" and self.command != "GET":  # the work was done, the answer never arrives
            self.status = status
            return self.abort()
        self.send_response_only(status)
        self.status = status
        for x, v in h.items():
            self.send_header(x, str(v))
        chunked = h.get("Transfer-Encoding") == "chunked"
        if not chunked and not (k == "drop_headers" and "content-length" in low):
            self.send_header("Content-Length", str(length))
        elif not chunked:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD" or status in (204, 304):
            return None
        cut = length
        if k == "truncate":
            cut = min(length, int(length * f["fraction"]) if "fraction" in f else f.get("bytes", length // 2))
        src = None if file is None else open(file, "rb")
        try:
            if src:
                src.seek(a)
            done = 0
            while done < cut:
                n = min(cut - done, f.get("rate", 1 << 20) if k == "slow" else 1 << 20)
                chunk = src.read(n) if src else body[a + done : a + done + n]
                if k == "corrupt":
                    at = f.get("offset", length // 2)
                    if done <= at < done + len(chunk):
                        chunk = bytearray(chunk)
                        chunk[at - done] ^= 0xFF
                self.wfile.write(b"%x\r\n" % len(chunk) + bytes(chunk) + b"\r\n" if chunked else bytes(chunk))
                done += len(chunk)
                self.sent = done
                if k == "slow":
                    time.sleep(1)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        finally:
            if src:
                src.close()
        if k == "truncate":
            self.wfile.flush()
            if f.get("reset"):
                self.abort()
            self.close_connection = True
        return None

    def reply(self, obj, status=200, headers=None):
        self.send(
            status, json.dumps(obj).encode(), {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        )

    def error(self, e):
        h = {"X-Error-Message": e.message.replace("\n", " ")[:300], **e.headers}
        if e.code:
            h["X-Error-Code"] = e.code
        if self._body is None and not self.body_done:
            n = int(self.headers.get("Content-Length") or 0)
            if n > 64 << 20:
                self.close_connection = True
            else:
                self.body()
        self.reply(e.body if e.body is not None else {"error": e.message}, e.status, h)

    # -- who is asking
    def authenticate(self):
        a = self.headers.get("Authorization") or ""
        if not a:
            return
        tok = a[7:] if a.lower().startswith("bearer ") else ""
        if a.lower().startswith("basic "):
            try:
                tok = base64.b64decode(a[6:]).decode().split(":", 1)[1]
            except Exception:
                tok = ""
        t = self.hub.tokens.get(tok)
        if t is None:
            self.bad_token = True
            if self.upath.startswith("/api/") or "/resolve/" in self.upath:
                raise HubError(401, "Invalid credentials in Authorization header")
        else:
            self.user, self.role = t["user"], t["role"]

    def can_write(self, ns):
        return self.role == "write" and (ns == self.user or self.user in self.hub.orgs.get(ns, []))

    def member(self, ns):
        return self.user is not None and (ns == self.user or self.user in self.hub.orgs.get(ns, []))

    def missing(self):
        return (
            HubError(404, "Repository not found", "RepoNotFound")
            if self.user
            else HubError(401, "Invalid username or password.", "RepoNotFound")
        )

    def repo(self, kind, rid, write=False, content=False):
        r = self.store.repos.get((kind, rid))
        if r is None and (kind, rid) in self.store.moved:
            r = self.store.repos.get((kind, self.store.moved[(kind, rid)]))
        if r is None or (r["private"] and not self.member(r["id"].split("/")[0])):
            raise self.missing()
        if r.get("disabled"):
            raise HubError(403, "Access to this resource is disabled.")
        if write:
            if self.user is None:
                raise HubError(401, "Invalid username or password.")
            if not self.can_write(r["id"].split("/")[0]):
                raise HubError(
                    403,
                    f"You don't have the rights to write to {r['id']}"
                    if self.role == "write"
                    else "This token has no write permission",
                )
        if content and r["gated"] and not self.member(r["id"].split("/")[0]) and self.user not in r["access"]:
            raise HubError(
                403 if self.user else 401,
                f"Access to model {r['id']} is restricted and you are not in the authorized list.",
                "GatedRepo",
            )
        return r

    def rev(self, r, name):
        name = unquote(name)
        if name in r["branches"]:
            return r["branches"][name]
        if name in r["tags"]:
            return r["tags"][name]["commit"]
        m = re.fullmatch(r"refs/(pr|heads|tags)/(.+)", name)
        if m and m[1] == "pr" and m[2] in r["prs"]:
            return r["prs"][m[2]]
        if m and m[1] == "heads" and m[2] in r["branches"]:
            return r["branches"][m[2]]
        if m and m[1] == "tags" and m[2] in r["tags"]:
            return r["tags"][m[2]]["commit"]
        if re.fullmatch(r"[0-9a-f]{7,40}", name):
            hit = [o for o in r["commits"] if o.startswith(name)]
            if len(hit) == 1:
                return hit[0]
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    # -- routes
    def route(self):
        p, me = self.upath, self.command
        with_repo = re.match(r"^/api/(models|datasets|spaces|kernels)/([^/]+/[^/]+)(?:/(.*))?$", p)
        if p == "/api/whoami-v2":
            if self.user is None:
                raise HubError(401, "Invalid username or password.")
            return self.reply(
                {
                    "type": "user",
                    "id": sha1(self.user.encode())[:24],
                    "name": self.user,
                    "fullname": self.user,
                    "email": f"{self.user}@example.org",
                    "emailVerified": True,
                    "isPro": False,
                    "canPay": False,
                    "orgs": [
                        {"type": "org", "name": o, "fullname": o, "roleInOrg": "write"}
                        for o, m in self.hub.orgs.items()
                        if self.user in m
                    ],
                    "auth": {
                        "type": "access_token",
                        "accessToken": {"displayName": "test", "role": self.role, "createdAt": now()},
                    },
                }
            )
        if p == "/api/validate-yaml":
            return self.validate_yaml()
        if p == "/api/repos/create" and me == "POST":
            return self.create_repo()
        if p == "/api/repos/delete" and me == "DELETE":
            j = self.json()
            with self.store.lock:
                r = self.repo(j.get("type") or "model", f"{j.get('organization') or self.user}/{j['name']}", write=True)
                del self.store.repos[(r["type"], r["id"])]
                self.store.save()
            return self.send(200, b"OK")
        if p == "/api/repos/move" and me == "POST":
            return self.move_repo()
        m = re.fullmatch(r"/api/(models|datasets|spaces)", p)
        if m:
            return self.list_repos(TYPES[m[1]])
        m = re.match(r"^/api/resolve-cache/(models|datasets|spaces|kernels)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)$", p)
        if m:
            return self.resolve(TYPES[m[1]], m[2], m[3], unquote(m[4]), direct=True)
        if with_repo:
            return self.repo_api(TYPES[with_repo[1]], with_repo[2], with_repo[3] or "")
        m = re.match(r"^/(?:(datasets|spaces|kernels|models)/)?([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)$", p)
        if m and me == "POST":
            return getattr(self, "lfs_" + m[3])(TYPES[m[1] or "models"], m[2])
        m = re.match(
            r"^/(?:(datasets|spaces|kernels|models)/)?([^/]+/[^/]+)/(resolve|raw|blob)/((?:refs(?:%2F|/)[a-z]+(?:%2F|/)[^/]+)|[^/]+)/(.+)$",
            p,
        )
        if m:
            return self.resolve(TYPES[m[1] or "models"], m[2], m[4], unquote(m[5]), raw=m[3] == "raw")
        m = re.fullmatch(r"/_lfs/complete/([0-9a-f]+)", p)
        if m and me == "POST":
            return self.lfs_complete(m[1])
        m = re.match(r"^/xet/(.+)$", p)
        if m:
            return self.cas(m[1])
        if p.startswith("/api/telemetry"):
            return self.send(200)
        if p == "/api/agent-harnesses":
            return self.reply({"standardEnvVars": [], "harnesses": {}})
        m = re.match(r"^/api/(?:users|organizations)/([^/]+)/overview$", p)
        if m:
            return self.reply(
                {
                    "user": m[1],
                    "name": m[1],
                    "fullname": m[1],
                    "avatarUrl": "",
                    "type": "user",
                    "isPro": False,
                    "numModels": 0,
                }
            )
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def validate_yaml(self):
        errors, warns = self.check_card(self.json().get("content", ""))
        self.reply(
            {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warns]},
            400 if errors else 200,
        )

    def check_card(self, text):
        fm, errors, warns = front_matter(text), [], []
        if yaml is None:
            return errors, warns
        if fm is None:
            return errors, [
                "empty or missing yaml metadata in repo card (https://huggingface.co/docs/hub/model-cards#model-card-metadata)"
            ]
        try:
            d = yaml.safe_load(fm)
        except yaml.YAMLError as e:
            return [f"YAML Metadata Error: {e}"], warns
        if d is None:
            return errors, ["empty or missing yaml metadata in repo card"]
        if not isinstance(d, dict):
            return ["YAML Metadata Error: metadata must be a mapping"], warns
        for x in [d["license"]] if isinstance(d.get("license"), str) else d.get("license") or []:
            if x not in LICENSES:
                errors.append(f'"license" must be one of {sorted(LICENSES)}')
        bm = d.get("base_model")
        for x in [bm] if isinstance(bm, str) else bm or []:
            if not isinstance(x, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", x):
                errors.append(f'"base_model" with value "{x}" is not valid. Use a model id from https://hf.co/models.')
        if d.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
            errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
        for key in ("tags", "datasets", "language"):
            v = d.get(key)
            if v is not None and not isinstance(v, (str, list)):
                errors.append(f'"{key}" must be an array')
            elif isinstance(v, list) and not all(isinstance(x, str) for x in v):
                errors.append(f'"{key}" must be a string array')
        return errors, warns

    def create_repo(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        j = self.json()
        kind, ns = j.get("type") or "model", j.get("organization") or self.user
        rid = f"{ns}/{j.get('name', '')}"
        if (
            not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", rid)
            or ".." in rid
            or "--" in rid
            or rid.endswith((".git", ".ipynb"))
            or rid.split("/")[1][0] in "-."
            or rid[-1] in "-."
        ):
            raise HubError(400, f"Invalid repo name: {rid}")
        if not self.can_write(ns):
            raise HubError(
                403,
                f'You don\'t have the rights to create a {kind} under the namespace "{ns}"'
                if self.role == "write"
                else "This token has no write permission",
            )
        with self.store.lock:
            url = self.hub.url + ("" if kind == "model" else f"/{kind}s") + "/" + rid
            if (kind, rid) in self.store.repos:
                raise HubError(
                    409,
                    f"You already created this {kind} repo: {rid}",
                    body={"error": f"You already created this {kind} repo", "url": url},
                )
            self.store.new_repo(
                kind, rid, self.user, private=bool(j.get("private")) or j.get("visibility") == "private"
            )
        self.reply({"url": url, "name": rid, "id": secrets.token_hex(12)})

    def move_repo(self):
        j = self.json()
        with self.store.lock:
            r = self.repo(j["type"], j["fromRepo"], write=True)
            if not self.can_write(j["toRepo"].split("/")[0]):
                raise HubError(403, "no write permission on the target namespace")
            if (j["type"], j["toRepo"]) in self.store.repos:
                raise HubError(409, "target exists")
            del self.store.repos[(r["type"], r["id"])]
            self.store.moved[(r["type"], r["id"])] = j["toRepo"]
            r["id"] = j["toRepo"]
            self.store.repos[(r["type"], r["id"])] = r
            self.store.save()
        self.send(200, b"OK")

    # -- repo metadata
    def card(self, r, oid):
        e = r["commits"][oid]["files"].get("README.md")
        if not e or yaml is None:
            return {}
        fm = front_matter(self.store.read(e).decode("utf-8", "replace"))
        try:
            d = yaml.safe_load(fm) if fm else {}
        except yaml.YAMLError:
            d = {}
        return json.loads(json.dumps(d, default=str)) if isinstance(d, dict) else {}

    def info(self, r, oid, blobs=False):
        files, card = r["commits"][oid]["files"], self.card(r, oid)

        def as_list(v):
            return [v] if isinstance(v, str) else [x for x in v or [] if isinstance(x, str)]

        tags = as_list(card.get("tags"))
        lib = card.get("library_name") or next((t for t in tags if t in ("diffusers", "peft", "transformers")), None)
        rel = card.get("base_model_relation")
        bases = as_list(card.get("base_model"))
        if bases and not rel:  # an approximation of the Hub's own inference, which is not public
            low = " ".join([r["id"], *tags]).lower()
            rel = (
                "merge"
                if len(bases) > 1
                else "adapter"
                if lib == "peft"
                or "adapter_config.json" in files
                or {"lora", "textual_inversion", "template:sd-lora", "peft"} & set(tags)
                else "quantized"
                if re.search(r"gguf|awq|gptq|[^a-z]nf4|bnb", low)
                else "finetune"
            )
        out = [lib] if lib else []
        out += ["safetensors"] if any(f.endswith(".safetensors") for f in files) else []
        out += (
            [t for t in tags if t not in out]
            + as_list(card.get("language"))
            + ["dataset:" + d for d in as_list(card.get("datasets"))]
        )
        out += [f"base_model:{b}" for b in bases] + ([f"base_model:{rel}:{b}" for b in bases])
        out += ["license:" + x for x in as_list(card.get("license"))] + ["region:us"]
        sib = []
        for path, e in sorted(files.items()):
            s = {"rfilename": path}
            if blobs:
                s.update(size=e["size"], blobId=e["oid"])
                if "sha256" in e:
                    s["lfs"] = {"sha256": e["sha256"], "size": e["size"], "pointerSize": e["pointer"]}
            sib.append(s)
        return {
            "_id": r["_id"],
            "id": r["id"],
            "modelId": r["id"],
            "author": r["id"].split("/")[0],
            "sha": oid,
            "lastModified": r["commits"][oid]["date"],
            "createdAt": r["created"],
            "private": r["private"],
            "gated": r["gated"],
            "disabled": False,
            "downloads": r.get("downloads", 0),
            "likes": 0,
            "tags": out,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": lib,
            "cardData": card or None,
            "siblings": sib,
            "spaces": [],
            "usedStorage": sum(r["lfs"].values()),
        }

    def list_repos(self, kind):
        rows = []
        with self.store.lock:
            for (k, rid), r in self.store.repos.items():
                if k != kind or (r["private"] and not self.member(rid.split("/")[0])):
                    continue
                i = self.info(r, r["branches"]["main"])
                if (self.q("author") and i["author"] != self.q("author")) or (
                    self.q("search") and self.q("search").lower() not in rid.lower()
                ):
                    continue
                want = [x for f in self.query.get("filter", []) for x in f.split(",") if x]
                if any(w not in i["tags"] and w not in (i["library_name"], i["pipeline_tag"]) for w in want):
                    continue
                if self.q("pipeline_tag") and i["pipeline_tag"] != self.q("pipeline_tag"):
                    continue
                rows.append(i)
        rows.sort(key=lambda i: i["lastModified"], reverse=True)
        limit, start = int(self.q("limit") or 1000), int(self.q("cursor") or 0)
        page = rows[start : start + limit]
        if not self.q("full"):
            page = [
                {
                    k: v
                    for k, v in i.items()
                    if k not in ("siblings", "cardData")
                    or (self.q("cardData") and k == "cardData")
                    or k in self.query.get("expand", [])
                }
                for i in page
            ]
        self.reply(page, headers=self.next_link(start + limit, len(rows)))

    def next_link(self, nxt, total):
        if nxt >= total:
            return {}
        qs = [(k, v) for k, v in parse_qsl(urlsplit(self.path).query) if k != "cursor"] + [("cursor", nxt)]
        return {"Link": f'<{self.hub.url}{self.upath}?{urlencode(qs)}>; rel="next"'}

    def repo_api(self, kind, rid, rest):
        me, parts = self.command, rest.split("/", 1)
        head, tail = parts[0], parts[1] if len(parts) > 1 else ""
        if head in ("", "revision") and me in ("GET", "HEAD"):
            r = self.repo(kind, rid)
            oid = self.rev(r, tail or "main")
            i = self.info(r, oid, blobs=self.q("blobs") in ("1", "true", "True"))
            if "expand" in self.query or "expand[]" in self.query:
                want = set(self.query.get("expand", []) + self.query.get("expand[]", []))
                base = i["tags"]
                i["baseModels"] = {
                    "relation": next(
                        (t.split(":")[1] for t in base if t.count(":") >= 2 and t.startswith("base_model:")), None
                    )
                }
                i = {k: v for k, v in i.items() if k in want | {"_id", "id"}}
            return self.reply(i)
        if head == "auth-check":
            self.repo(kind, rid, content=True)
            return self.send(200, b"OK")
        if head == "tree":
            return self.tree(kind, rid, tail)
        if head == "paths-info":
            r = self.repo(kind, rid)
            oid = self.rev(r, tail)
            form = self.json() if "json" in (self.headers.get("Content-Type") or "") else parse_qs(self.body().decode())
            ex = (
                str(
                    form.get("expand", [False])[-1] if isinstance(form.get("expand"), list) else form.get("expand")
                ).lower()
                == "true"
            )
            rows = [self.node(r, oid, p.strip("/"), ex) for p in form.get("paths", [])]
            return self.reply([x for x in rows if x])
        if head == "preupload" and me == "POST":
            return self.preupload(kind, rid, tail)
        if head == "commit" and me == "POST":
            return self.make_commit(kind, rid, tail)
        if head == "commits":
            r = self.repo(kind, rid)
            rows = self.store.history(r, self.rev(r, tail))
            n, start = self.hub.page_size or 50, int(self.q("cursor") or 0)

            def fmt(c):
                return {
                    "id": c["oid"],
                    "title": c["title"],
                    "message": c["message"],
                    "date": c["date"],
                    "authors": [{"user": c["author"]}],
                    "parents": c["parents"],
                }

            return self.reply(
                [fmt(c) for c in rows[start : start + n]],
                headers={"X-Total-Count": len(rows), **self.next_link(start + n, len(rows))},
            )
        if head == "refs":
            r = self.repo(kind, rid)

            def ref(n, full, c):
                return {"name": n, "ref": full, "targetCommit": c}

            out = {
                "branches": [ref(b, f"refs/heads/{b}", c) for b, c in r["branches"].items()],
                "converts": [],
                "tags": [ref(t, f"refs/tags/{t}", v["commit"]) for t, v in r["tags"].items()],
            }
            if self.q("include_prs"):
                out["pullRequests"] = [ref(f"refs/pr/{n}", f"refs/pr/{n}", c) for n, c in r["prs"].items()]
            return self.reply(out)
        if head in ("branch", "tag"):
            return self.edit_ref(kind, rid, head, unquote(tail))
        if head == "settings" and me == "PUT":
            with self.store.lock:
                r, j = self.repo(kind, rid, write=True), self.json()
                if "visibility" in j or "private" in j:
                    r["private"] = j.get("visibility") == "private" or bool(j.get("private"))
                if "gated" in j:
                    r["gated"] = j["gated"]
                self.store.save()
            return self.reply({"private": r["private"], "gated": r["gated"]})
        if head == "discussions":
            return self.discussions(kind, rid, tail)
        if head == "lfs-files":
            return self.lfs_files(kind, rid, tail)
        if head == "super-squash" and me == "POST":
            with self.store.lock:
                r, b = self.repo(kind, rid, write=True), unquote(tail)
                if b not in r["branches"]:
                    raise HubError(404, f"Invalid rev id: {b}", "RevisionNotFound")
                self.store.commit(
                    r,
                    b,
                    r["commits"][r["branches"][b]]["files"],
                    self.json().get("message") or "Super-squash",
                    "",
                    self.user,
                    [],
                )
            return self.reply({})
        if head == "safetensors-metadata":
            return self.safetensors_index(kind, rid, unquote(tail))
        m = re.fullmatch(r"xet-(read|write)-token", head)
        if m:
            r = self.repo(kind, rid, write=m[1] == "write" and not self.q("create_pr"), content=True)
            if unquote(tail) not in ("None", "") and not (m[1] == "write" and self.q("create_pr")):
                self.rev(r, tail)
            exp = int(time.time()) + self.hub.xet_ttl
            who = binascii.hexlify(f"{kind}:{r['id']}".encode()).decode()
            tok = f"xet_{m[1]}_{exp}_{who}_{self.hub.sign(m[1] + str(exp) + who)}"
            return self.reply(
                {"accessToken": tok, "exp": exp, "casUrl": self.hub.url + "/xet"},
                headers={
                    "X-Xet-Cas-Url": self.hub.url + "/xet",
                    "X-Xet-Access-Token": tok,
                    "X-Xet-Token-Expiration": exp,
                },
            )
        raise HubError(404, f"Not implemented here: {me} {self.upath}")

    def node(self, r, oid, path, expand=False, ids=None):
        files = r["commits"][oid]["files"]
        if path in files:
            e = files[path]
            n = {"type": "file", "oid": e["oid"], "size": e["size"], "path": path}
            if "sha256" in e:
                n["lfs"] = {"oid": e["sha256"], "size": e["size"], "pointerSize": e["pointer"]}
                if e["sha256"] in self.store.xet["by_sha"]:
                    n["xetHash"] = self.store.xet["by_sha"][e["sha256"]]
            if expand:
                n["securityFileStatus"] = {"status": "safe", "avScan": {"status": "safe"}, "pickleImportScan": None}
        elif any(f.startswith(path + "/") for f in files):
            n = {"type": "directory", "oid": (ids or tree_ids(files))[path], "size": 0, "path": path}
        else:
            return None
        if expand:
            n["lastCommit"] = self.store.last_touch(r, oid, path)
        return n

    def tree(self, kind, rid, tail):
        r = self.repo(kind, rid)
        # the client quotes the revision wholly, so the first segment is the revision
        rv, _, sub = tail.partition("/")
        oid, sub = self.rev(r, rv), unquote(sub).strip("/")
        files = r["commits"][oid]["files"]
        base = sub + "/" if sub else ""
        if sub and not any(f.startswith(base) for f in files):
            raise HubError(404, f'{sub} does not exist on "{unquote(rv)}"', "EntryNotFound", {"X-Repo-Commit": oid})
        recursive, expand = (
            self.q("recursive", "").lower() in ("1", "true"),
            self.q("expand", "").lower() in ("1", "true"),
        )
        names = set()
        for f in files:
            if f.startswith(base):
                rel = f[len(base) :].split("/")
                for i in range(1, len(rel) + 1) if recursive else (1,):
                    names.add(base + "/".join(rel[:i]))
        ids = tree_ids(files)
        rows = sorted(names, key=lambda n: (n in files, n))
        n, start = self.hub.page_size or int(self.q("limit") or (50 if expand else 1000)), int(self.q("cursor") or 0)
        self.reply(
            [self.node(r, oid, x, expand, ids) for x in rows[start : start + n]],
            headers=self.next_link(start + n, len(rows)),
        )

    def edit_ref(self, kind, rid, what, name):
        with self.store.lock:
            r, j = self.repo(kind, rid, write=True), self.json() if self.command == "POST" else {}
            if what == "branch" and self.command == "POST":
                if name.startswith("refs/"):
                    raise HubError(400, f"Invalid reference for a branch: {name}")
                if name in r["branches"]:
                    raise HubError(409, f"Reference already exists: refs/heads/{name}")
                r["branches"][name] = self.rev(r, j.get("startingPoint") or "main")
            elif what == "branch":
                if name == "main":
                    raise HubError(403, "Cannot delete refs/heads/main: it is protected")
                if r["branches"].pop(name, None) is None:
                    raise HubError(404, f"Reference does not exist: {name}", "RevisionNotFound")
            elif self.command == "POST":
                if j["tag"] in r["tags"]:
                    raise HubError(409, f"Tag reference exists already: refs/tags/{j['tag']}")
                r["tags"][j["tag"]] = {"commit": self.rev(r, name), "message": j.get("message")}
            elif r["tags"].pop(name, None) is None:
                raise HubError(404, f"Tag not found: {name}", "RevisionNotFound")
            self.store.save()
        self.send(200, b"OK")

    # -- writing
    def preupload(self, kind, rid, rv):
        r = self.repo(kind, rid, write=not self.q("create_pr"))
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        oid, j = self.rev(r, rv), self.json()
        files = r["commits"][oid]["files"]
        if len(j.get("files", [])) > 256:
            raise HubError(413, "too many files in one preupload call")
        att = self.store.read(files[".gitattributes"]).decode("utf-8", "replace") if ".gitattributes" in files else ""
        lfs = [ln.split()[0] for ln in att.splitlines() if "filter=lfs" in ln]
        ign = j.get("gitIgnore")
        if ign is None and ".gitignore" in files:
            ign = self.store.read(files[".gitignore"]).decode("utf-8", "replace")
        ign = [x.strip() for x in (ign or "").splitlines() if x.strip() and not x.startswith("#")]

        def hit(path, pat):
            return (
                fnmatch.fnmatch(path, pat)
                or fnmatch.fnmatch(os.path.basename(path), pat.strip("/"))
                or path.startswith(pat.strip("/") + "/")
            )

        out = []
        for f in j.get("files", []):
            try:
                sample = base64.b64decode(f.get("sample") or "")
                sample[:480].decode("utf-8")
                binary = b"\0" in sample
            except UnicodeDecodeError as e:
                binary = e.start < len(sample[:480]) - 4
            mode = (
                "lfs"
                if f["size"] > self.hub.lfs_threshold or binary or any(hit(f["path"], p) for p in lfs)
                else "regular"
            )
            e = files.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": mode,
                    "shouldIgnore": any(hit(f["path"], p) for p in ign),
                    "oid": (e.get("sha256") or e["oid"]) if e else None,
                }
            )
        self.reply({"files": out, "commitOid": oid})

    def make_commit(self, kind, rid, rv):
        pr = self.q("create_pr") in ("1", "true", "True")
        raw = self.body()
        with self.store.lock:
            r = self.repo(kind, rid, write=not pr)
            if self.user is None:
                raise HubError(401, "Invalid username or password.")
            if self.role != "write":
                raise HubError(403, "This token has no write permission")
            name = unquote(rv)
            m = re.fullmatch(r"refs/pr/(\d+)", name)
            if m is None and name not in r["branches"]:
                self.rev(r, rv)  # raises for unknown revisions
                raise HubError(400, f"Cannot commit to {name}: not a branch", "RevisionNotFound")
            if m and pr:
                raise HubError(400, "cannot open a pull request against a pull request")
            head = r["prs"].get(m[1]) if m else r["branches"][name]
            if head is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            header, ops = None, []
            for ln in raw.splitlines():
                if ln.strip():
                    try:
                        o = json.loads(ln)
                    except ValueError:
                        raise HubError(400, "Invalid NDJSON")
                    if o["key"] == "header":
                        header = o["value"]
                    else:
                        ops.append((o["key"], o["value"]))
            if header is None or not header.get("summary"):
                raise HubError(400, "Missing commit header or summary")
            want = header.get("parentCommit")
            if want:
                if pr:
                    head = self.rev(r, want)
                elif not head.startswith(want):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(r["commits"][head]["files"])
            for key, v in ops:
                path = v["path"]
                if any(s in ("", ".", "..", ".git") for s in path.rstrip("/").split("/")) or path.startswith("/"):
                    raise HubError(400, f"Invalid path: {path}")
                if key == "file":
                    data = base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode()
                    if len(data) > max(BIG, self.hub.lfs_threshold):
                        raise HubError(
                            400,
                            f"Your push was rejected because it contains files larger than 10 MiB. Offending file: {path}",
                        )
                    if path == "README.md":
                        errs, _ = self.check_card(data.decode("utf-8", "replace"))
                        if errs:
                            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errs))
                    files[path] = self.store.put_blob(data)
                elif key == "lfsFile":
                    sha = v["oid"]
                    if sha not in r["lfs"]:
                        raise HubError(
                            400,
                            f"Your push was rejected because an LFS pointer pointed to a file that does not exist. Offending file: {path}",
                        )
                    files[path] = self.store.lfs_entry(sha, r["lfs"][sha])
                elif key == "deletedFile":
                    if path not in files:
                        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    del files[path]
                elif key in ("deletedFolder", "deletedEntry"):
                    gone = [f for f in files if f == path.rstrip("/") or f.startswith(path.rstrip("/") + "/")]
                    if not gone:
                        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    for f in gone:
                        del files[f]
                else:
                    raise HubError(400, f"Unknown operation {key}")
            tree_ids(files)  # rejects file/folder clashes
            url = self.hub.url + ("" if kind == "model" else f"/{kind}s") + "/" + r["id"]
            res = {"success": True, "hookOutput": ""}
            if pr:
                t = self.open_talk(r, header["summary"], header.get("description") or "", True, name, head)
                num = str(t["num"])
                oid = self.store.commit(
                    r, num, files, header["summary"], header.get("description") or "", self.user, [head], ref="prs"
                )
                t["status"] = "open"
                t["events"].append(self.event("commit", {"subject": header["summary"], "oid": oid}))
                res["pullRequestUrl"] = f"{url}/discussions/{num}"
            elif m:
                oid = self.store.commit(
                    r, m[1], files, header["summary"], header.get("description") or "", self.user, [head], ref="prs"
                )
            else:
                oid = self.store.commit(
                    r, name, files, header["summary"], header.get("description") or "", self.user, [head]
                )
            self.store.save()
            res.update(commitOid=oid, commitUrl=f"{url}/commit/{oid}")
        self.reply(res)

    # -- LFS
    def lfs_batch(self, kind, rid):
        j = self.json()
        r = self.repo(kind, rid, write=False)
        if self.user is None or self.role != "write" or (j.get("ref") and not self.can_write(r["id"].split("/")[0])):
            raise HubError(403 if self.user else 401, "no write permission")
        out, multi = [], self.hub.multipart
        for o in j["objects"]:
            sha, size = o["oid"], o["size"]
            item = {"oid": sha, "size": size, "authenticated": True}
            if j.get("operation") == "download":
                item["actions"] = {"download": {"href": self.hub.cdn_link(sha)}} if sha in r["lfs"] else None
            elif sha not in r["lfs"]:
                key = f"{kind}:{r['id']}"
                if size >= multi and "multipart" in j.get("transfers", []):
                    up = secrets.token_hex(8)
                    n = -(-size // self.hub.part)
                    self.hub.uploads[up] = {"repo": key, "sha": sha, "size": size, "parts": n}
                    hdr = {
                        "chunk_size": str(self.hub.part),
                        **{f"{i + 1:05d}": self.hub.cdn_url(f"/part/{up}/{i + 1}") for i in range(n)},
                    }
                    item["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/complete/{up}", "header": hdr}}
                else:
                    item["actions"] = {
                        "upload": {"href": self.hub.cdn_url(f"/put/{sha}/{size}?" + urlencode({"repo": key}))}
                    }
                item["actions"]["verify"] = {
                    "href": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{r['id']}.git/info/lfs/objects/verify"
                }
            out.append(item)
        self.reply(
            {
                "transfer": "multipart"
                if any("chunk_size" in (i.get("actions") or {}).get("upload", {}).get("header", {}) for i in out)
                else "basic",
                "objects": out,
                "hash_algo": "sha256",
            }
        )

    def lfs_verify(self, kind, rid):
        j, r = self.json(), self.repo(kind, rid)
        f = self.store.path("lfs", j["oid"])
        if not os.path.exists(f) or os.path.getsize(f) != j["size"] or j["oid"] not in r["lfs"]:
            raise HubError(404, "object was not uploaded")
        self.reply({})

    def lfs_files(self, kind, rid, tail):
        r = self.repo(kind, rid, write=True)
        if tail == "batch":
            with self.store.lock:
                for sha in self.json()["deletions"]["sha"]:
                    for c in r["commits"].values():
                        c["files"] = {p: e for p, e in c["files"].items() if e["oid"] != sha and e.get("sha256") != sha}
                self.store.save()
            return self.reply({})
        if tail == "duplicate":
            j = self.json()
            with self.store.lock:
                dst = self.repo(j["target"]["type"], j["target"]["name"], write=True)
                for f in j["files"]:
                    if f["sha256"] in r["lfs"]:
                        dst["lfs"][f["sha256"]] = r["lfs"][f["sha256"]]
                self.store.save()
            return self.reply({"failed": []})
        rows, seen = [], set()
        for c in self.store.history(r, r["branches"]["main"]):
            for p, e in c["files"].items():
                if "sha256" in e and (p, e["sha256"]) not in seen:
                    seen.add((p, e["sha256"]))
                    rows.append(
                        {
                            "fileOid": e["oid"],
                            "filename": p,
                            "oid": e["sha256"],
                            "pushedAt": c["date"],
                            "ref": "main",
                            "size": e["size"],
                        }
                    )
        self.reply(rows)
        return None

    # -- reading
    def resolve(self, kind, rid, rv, path, raw=False, direct=False):
        r = self.repo(kind, rid, content=True)
        oid = self.rev(r, rv)
        e = r["commits"][oid]["files"].get(path)
        if e is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        name = path.rsplit("/", 1)[-1]
        h = {
            "X-Repo-Commit": oid,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";",
            "Access-Control-Expose-Headers": "X-Repo-Commit,X-Linked-Size,X-Linked-ETag,X-Xet-Hash",
        }
        if self.headers.get("X-HF-Download-Counter") and self.command == "GET":
            r["downloads"] = r.get("downloads", 0) + 1
        if "sha256" in e and not raw:
            h.update({"X-Linked-Size": e["size"], "X-Linked-ETag": f'"{e["sha256"]}"'})
            xh = self.store.xet["by_sha"].get(e["sha256"])
            if xh and self.hub.serve_xet:
                base = f"{self.hub.url}/api/{kind}s/{r['id']}/xet-read-token/{oid}"
                h.update(
                    {
                        "X-Xet-Hash": xh,
                        "Link": f'<{base}>; rel="xet-auth", <{self.hub.url}/xet/v1/reconstructions/{xh}>; rel="xet-reconstruction-info"',
                    }
                )
            if self.hub.cdn_port:
                loc = self.hub.cdn_link(e["sha256"], name)
                return self.send(302, b"Found. Redirecting to CDN", {**h, "Location": loc, "Vary": "Accept"})
            h["ETag"] = f'"{e["sha256"]}"'
            return self.ranged(self.store.file_of(e), e["size"], h)
        h["ETag"] = f'"{e["oid"]}"'
        if self.hub.resolve_cache and not direct and not raw and "sha256" not in e:
            # what the Hub does for git blobs: a relative redirect on the same host
            return self.send(307, b"", {**h, "Location": f"/api/resolve-cache/{kind}s/{r['id']}/{oid}/{quote(path)}"})
        if raw and "sha256" in e:
            return self.send(200, pointer(e["sha256"], e["size"]), {**h, "Content-Type": "text/plain; charset=utf-8"})
        self.ranged(self.store.file_of(e), e["size"], {**h, "Content-Type": "text/plain; charset=utf-8"})
        return None

    def ranged(self, file, size, h):
        inm = self.headers.get("If-None-Match")
        if inm and h.get("ETag") and h["ETag"] in inm:
            return self.send(304, b"", h)
        rg = self.headers.get("Range")
        m = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", rg or "")
        if (self.fault or {}).get("kind") == "norange":
            m = None
        held = self.headers.get("If-Range")
        if held and held != ((self.fault or {}).get("headers") or {}).get("ETag", h.get("ETag")):
            m = None  # RFC 9110 13.1.5: the part the client has is of another file, so the whole one comes
        h.setdefault("Content-Type", "application/octet-stream")
        if not m or not (m[1] or m[2]):
            return self.send(200, b"", h, file=file, rng=(0, size))
        a, b = (int(m[1]), min(int(m[2]) + 1 if m[2] else size, size)) if m[1] else (max(0, size - int(m[2])), size)
        if a >= size or b <= a:
            return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
        self.send(206, b"", {**h, "Content-Range": f"bytes {a}-{b - 1}/{size}"}, file=file, rng=(a, b))
        return None

    def safetensors_index(self, kind, rid, path):
        r = self.repo(kind, rid, content=True)
        files = r["commits"][r["branches"]["main"]]["files"]
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        idx, headers = json.loads(self.store.read(files[path])), {}
        for sh in sorted(set(idx["weight_map"].values())):
            with open(self.store.file_of(files[sh]), "rb") as f:
                headers[sh] = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        self.reply({"index": {k: v for k, v in idx.items() if k != "weight_map"}, "headers": headers})

    # -- storage host ("S3"/"CDN"): a different origin, so a client must not send its token here
    def cdn(self):
        if self.headers.get("Authorization") and self.server.role == "cdn":
            self.rec["leaked_auth"] = True
            raise HubError(400, "Only one auth mechanism allowed; the Authorization header reached the storage host")

        def strip(x):
            return x[len("/_storage") :] if x.startswith("/_storage/") else x

        if not self.hub.signed(strip(self.path)):
            raise HubError(403, "Request has expired or the signature does not match")
        p, me = strip(self.upath), self.command
        m = re.fullmatch(r"/get/([0-9a-f]{64})", p)
        if m and me in ("GET", "HEAD"):
            f = self.store.path("lfs", m[1])
            if not os.path.exists(f):
                raise HubError(404, "NoSuchKey")
            return self.ranged(
                f,
                os.path.getsize(f),
                {"ETag": f'"{m[1]}"', "Accept-Ranges": "bytes", "Content-Disposition": self.q("cd", "inline")},
            )
        m = re.fullmatch(r"/xorb/([0-9a-f]{64})", p)
        if m and me == "GET":
            f = self.store.path("xorb", m[1])
            return self.ranged(f, os.path.getsize(f), {"Accept-Ranges": "bytes"})
        m = re.fullmatch(r"/put/([0-9a-f]{64})/(\d+)", p)
        if m and me == "PUT":
            self.take(m[1], int(m[2]), self.body_stream(), self.q("repo"))
            return self.send(200, b"", {"ETag": f'"{m[1][:32]}"'})
        m = re.fullmatch(r"/part/([0-9a-f]+)/(\d+)", p)
        if m and me == "PUT":
            h = hashlib.md5()
            with open(self.store.path("tmp", f"{m[1]}.{m[2]}"), "wb") as f:
                for b in self.body_stream():
                    f.write(b)
                    h.update(b)
            return self.send(200, b"", {"ETag": f'"{h.hexdigest()}"'})
        raise HubError(404, "NoSuchKey")

    def take(self, sha, size, stream, repo_key):
        """store an uploaded object, refusing content that does not hash to its name"""
        t, h, n = self.store.path("tmp", secrets.token_hex(8)), hashlib.sha256(), 0
        with open(t, "wb") as f:
            for b in stream:
                f.write(b)
                h.update(b)
                n += len(b)
        if h.hexdigest() != sha or n != size:
            os.unlink(t)
            raise HubError(
                400, f"XAmzContentSHA256Mismatch: got {h.hexdigest()} ({n} bytes), expected {sha} ({size} bytes)"
            )
        os.replace(t, self.store.path("lfs", sha))
        with self.store.lock:
            r = self.store.repos.get(tuple(repo_key.split(":", 1)))
            if r is not None:
                r["lfs"][sha] = size
                self.store.save()

    def lfs_complete(self, key):
        j, up = self.json(), self.hub.uploads.get(key)
        if up is None or sorted(x["partNumber"] for x in j["parts"]) != list(range(1, up["parts"] + 1)):
            raise HubError(400, "incomplete multipart upload")

        def stream():
            for i in range(1, up["parts"] + 1):
                f = self.store.path("tmp", f"{key}.{i}")
                with open(f, "rb") as h:
                    yield h.read()
                os.unlink(f)

        self.take(up["sha"], up["size"], stream(), up["repo"])
        self.reply({"success": True})

    # -- xet content addressed store, served under /xet
    def cas(self, p):
        me = self.command
        tok = re.fullmatch(r"Bearer xet_(read|write)_(\d+)_([0-9a-f]+)_(\w+)", self.headers.get("Authorization") or "")
        if (
            not tok
            or not hmac.compare_digest(tok[4], self.hub.sign(tok[1] + tok[2] + tok[3]))
            or int(tok[2]) < time.time()
        ):
            raise HubError(401, "bad or expired xet token")
        self.xet_repo = self.store.repos.get(tuple(bytes.fromhex(tok[3]).decode().split(":", 1)))
        if me == "POST" and tok[1] != "write":
            raise HubError(403, "read scope")
        m = re.fullmatch(r"v1/xorbs/default/([0-9a-f]{64})", p)
        if m and me == "POST":
            data = self.body()
            rows = xorb_chunks(data)
            if not rows:
                raise HubError(400, "not a xorb")
            new = m[1] not in self.store.xet["xorbs"]
            if new:
                t = self.store.path("tmp", secrets.token_hex(8))
                with open(t, "wb") as f:
                    f.write(data)
                os.replace(t, self.store.path("xorb", m[1]))
                with self.store.lock:
                    self.store.xet["xorbs"][m[1]] = [[r[0], r[1], r[2], r[3]] for r in rows]
            return self.reply({"was_inserted": new})
        if m and me == "HEAD":
            if m[1] not in self.store.xet["xorbs"]:
                raise HubError(404, "no such xorb")
            return self.send(200, b"", {"Content-Length": os.path.getsize(self.store.path("xorb", m[1]))})
        if p in ("v1/shards", "v2/shards") and me == "POST":
            return self.shard(p[:2])
        m = re.fullmatch(r"(v1|v2)/reconstructions/([0-9a-f]{64})", p)
        if m and me == "GET":
            return self.reconstruct(m[1], m[2])
        raise HubError(404, "not found")

    def shard(self, version):
        try:
            files = parse_shard(self.body())
        except (struct.error, IndexError):
            raise HubError(400, "malformed shard")
        x, problem = self.store.xet, None
        for fh, sha, terms in files:
            t, h, n = self.store.path("tmp", secrets.token_hex(8)), hashlib.sha256(), 0
            with open(t, "wb") as out:
                for xo, _, s, e in terms:
                    if xo not in x["xorbs"]:
                        raise HubError(400, f"unknown xorb {xo}")
                    with open(self.store.path("xorb", xo), "rb") as f:
                        data = f.read()
                    for row in x["xorbs"][xo][s:e]:
                        c = unpack_chunk(data, row)
                        out.write(c)
                        h.update(c)
                        n += len(c)
            # the digest is stored either as plain bytes or as four little endian words: accept whichever matches
            real = h.hexdigest()
            if sha is not None and sha not in (real, hash_str(bytes.fromhex(real))):
                os.unlink(t)
                problem = f"sha256 mismatch for file {fh}"
                break
            os.replace(t, self.store.path("lfs", real))
            with self.store.lock:
                x["files"][fh] = {"sha": real, "size": n, "terms": [list(q) for q in terms]}
                x["by_sha"][real] = fh
                if self.xet_repo is not None:
                    self.xet_repo["lfs"][real] = n
        self.store.save()
        if version == "v2":
            ev = [
                {"type": "validating", "verified": len(files), "total": len(files)},
                {"type": "committing", "stage": "syncing"},
                {"type": "error", "message": problem} if problem else {"type": "result", "result": 1},
            ]
            return self.send(
                200, b"".join(json.dumps(e).encode() + b"\n" for e in ev), {"Content-Type": "application/x-ndjson"}
            )
        if problem:
            raise HubError(400, problem)
        self.reply({"result": 1})
        return None

    def reconstruct(self, version, fh):
        x = self.store.xet
        f = x["files"].get(fh)
        if f is None:
            raise HubError(404, "no such file")
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        lo, hi = (int(m[1]), min(int(m[2]) + 1 if m[2] else f["size"], f["size"])) if m else (0, f["size"])
        if lo >= f["size"] and f["size"]:
            raise HubError(416, "out of range")
        terms, fetch, pos, skip = [], {}, 0, None
        for xo, _un, s, e in f["terms"]:
            rows = x["xorbs"][xo]
            while s < e and pos + rows[s][3] <= lo:
                pos += rows[s][3]
                s += 1
            if s < e and skip is None and pos < hi:
                skip = lo - pos
            a = s
            start = pos
            while s < e and pos < hi:
                pos += rows[s][3]
                s += 1
            if s > a:
                terms.append({"hash": xo, "unpacked_length": pos - start, "range": {"start": a, "end": s}})
                fetch.setdefault(xo, []).append((a, s))
        out = {"offset_into_first_range": skip or 0, "terms": terms}

        def span(xo, a, s):
            return {"start": x["xorbs"][xo][a][0], "end": x["xorbs"][xo][s - 1][1] - 1}

        if version == "v1":
            out["fetch_info"] = {
                xo: [
                    {
                        "range": {"start": a, "end": s},
                        "url": self.hub.cdn_url(f"/xorb/{xo}"),
                        "url_range": span(xo, a, s),
                    }
                    for a, s in sorted(set(v))
                ]
                for xo, v in fetch.items()
            }
        else:  # one entry per range, so no answer is ever multipart/byteranges
            out["xorbs"] = {
                xo: [
                    {
                        "url": self.hub.cdn_url(f"/xorb/{xo}"),
                        "ranges": [{"chunks": {"start": a, "end": s}, "bytes": span(xo, a, s)}],
                    }
                    for a, s in sorted(set(v))
                ]
                for xo, v in fetch.items()
            }
        self.reply(out)

    # -- discussions and pull requests
    def event(self, kind, data):
        return {
            "id": secrets.token_hex(12),
            "author": {"name": self.user},
            "createdAt": now(),
            "type": kind,
            "data": data,
        }

    def comment(self, text):
        return self.event(
            "comment",
            {
                "edited": False,
                "hidden": False,
                "latest": {"raw": text, "html": text, "updatedAt": now(), "author": {"name": self.user}},
            },
        )

    def open_talk(self, r, title, text, pr, base="main", head=None):
        t = {
            "num": len(r["talks"]) + 1,
            "title": title,
            "author": self.user,
            "created": now(),
            "status": "draft" if pr else "open",
            "pr": pr,
            "base": base,
            "merge": None,
            "events": [self.comment(text)],
            "base_commit": head,
        }
        r["talks"].append(t)
        if pr:
            r["prs"][str(t["num"])] = head or r["branches"][base]
            t["base_commit"] = r["prs"][str(t["num"])]
        return t

    def discussions(self, kind, rid, tail):
        r, me = self.repo(kind, rid), self.command

        def head(t):
            return {
                "num": t["num"],
                "title": t["title"],
                "author": {"name": t["author"]},
                "createdAt": t["created"],
                "status": t["status"],
                "isPullRequest": t["pr"],
                "repo": {"name": r["id"], "type": r["type"]},
                "numComments": len(t["events"]),
                "pinned": False,
            }

        if me == "POST" and self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not tail:
            if me == "POST":
                with self.store.lock:
                    j = self.json()
                    if not 3 <= len(j.get("title", "").strip()) <= 200:
                        raise HubError(400, "title must be 3 to 200 characters")
                    t = self.open_talk(r, j["title"], j.get("description") or "", bool(j.get("pullRequest")))
                    self.store.save()
                return self.reply(
                    {"num": t["num"], "url": f"/{r['id']}/discussions/{t['num']}", "pullRequest": t["pr"]}
                )
            rows = [
                t
                for t in reversed(r["talks"])
                if self.q("type", "all") in ("all", "pull_request" if t["pr"] else "discussion")
                and (
                    self.q("status", "all") == "all"
                    or (self.q("status") == "open") == (t["status"] in ("open", "draft"))
                )
                and self.q("author", t["author"]) == t["author"]
            ]
            n, page = self.hub.page_size or 10, int(self.q("p") or 0)
            return self.reply(
                {"discussions": [head(t) for t in rows[page * n : page * n + n]], "count": len(rows), "start": page * n}
            )
        num, _, act = tail.partition("/")
        t = next((t for t in r["talks"] if str(t["num"]) == num), None)
        if t is None:
            raise HubError(404, "Discussion not found")
        if me == "GET":
            d = {**head(t), "events": t["events"]}
            if t["pr"]:
                a, b = r["commits"][t["base_commit"]]["files"], r["commits"][r["prs"][num]]["files"]
                diff = "".join(
                    f"diff --git a/{p} b/{p}\n"
                    for p in sorted(set(a) | set(b))
                    if a.get(p, {}).get("oid") != b.get(p, {}).get("oid")
                )
                d.update(
                    filesWithConflicts=self.conflicts(r, t),
                    changes={"base": f"refs/heads/{t['base']}", "mergeCommitId": t["merge"]},
                    diff=diff,
                )
            return self.reply(d)
        with self.store.lock:
            j = self.json() or {}
            owner = self.can_write(r["id"].split("/")[0])
            if act == "comment":
                e = self.comment(j["comment"])
                t["events"].append(e)
                self.store.save()
                return self.reply({"newMessage": e})
            if not owner and t["author"] != self.user:
                raise HubError(403, "not allowed")
            if act == "status":
                t["status"] = j["status"]
                e = self.event("status-change", {"status": j["status"]})
                t["events"].append(e)
                self.store.save()
                return self.reply({"newStatus": e})
            if act == "title":
                e = self.event("title-change", {"from": t["title"], "to": j["title"]})
                t["title"] = j["title"]
                t["events"].append(e)
                self.store.save()
                return self.reply({"newTitle": e})
            if act == "merge":
                if not owner:
                    raise HubError(403, "not allowed to merge")
                if not t["pr"] or t["status"] != "open":
                    raise HubError(400, f"cannot merge: status is {t['status']}")
                bad = self.conflicts(r, t)
                if bad:
                    raise HubError(409, f"This pull request has conflicts in {bad}")
                base, mine = r["commits"][t["base_commit"]]["files"], r["commits"][r["prs"][num]]["files"]
                tip = r["branches"][t["base"]]
                files = dict(r["commits"][tip]["files"])
                for p in set(base) | set(mine):
                    if base.get(p, {}).get("oid") != mine.get(p, {}).get("oid"):
                        files.pop(p, None) if p not in mine else files.__setitem__(p, mine[p])
                t["merge"] = self.store.commit(r, t["base"], files, t["title"], "", self.user, [tip, r["prs"][num]])
                t["status"] = "merged"
                t["events"].append(self.event("status-change", {"status": "merged"}))
                self.store.save()
                return self.reply({"mergeCommitId": t["merge"]})
        raise HubError(404, f"unknown action {act}")

    def conflicts(self, r, t):
        base, mine, tip = (
            r["commits"][o]["files"] for o in (t["base_commit"], r["prs"][str(t["num"])], r["branches"][t["base"]])
        )

        def g(d, p):
            return d.get(p, {}).get("oid")

        return [
            p
            for p in sorted(set(base) | set(mine) | set(tip))
            if g(base, p) != g(mine, p) and g(base, p) != g(tip, p) and g(mine, p) != g(tip, p)
        ]

    # -- test controls, loopback only
    def admin(self):
        a, h = self.upath[8:], self.hub
        if a == "faults":
            if self.command == "POST":
                j = self.json()
                return self.reply([h.fault(**x) for x in (j if isinstance(j, list) else [j])])
            if self.command == "DELETE":
                h.clear()
            return self.reply(h.faults)
        if a == "log":
            if self.command == "DELETE":
                h.requests.clear()
            return self.reply(h.log())
        if a == "reset" and self.command == "POST":
            h.reset()
            return self.reply({})
        if a == "state":
            return self.reply(
                {
                    "url": h.url,
                    "cdn": h.cdn,
                    "repos": [f"{k}:{i}" for k, i in h.store.repos],
                    "xet_files": len(h.store.xet["files"]),
                    "faults": len(h.faults),
                }
            )
        raise HubError(404, "admin: faults | log | reset | state")


# --------------------------------------------------------------------------------------------------------------- hub
class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def handle_error(self, request, client_address):
        pass


class Hub:
    """One running endpoint. cdn_port=None serves large files from the same origin instead of a second one."""

    def __init__(
        self,
        data=None,
        port=0,
        cdn_port=0,
        host="127.0.0.1",
        tokens=None,
        orgs=None,
        page_size=None,
        lfs_threshold=BIG,
        multipart=1 << 40,
        part=5_000_000,
        resolve_cache=True,
        serve_xet=True,
        xet_ttl=900,
    ):
        self.tmp = data is None
        self.data = data or tempfile.mkdtemp(prefix="hubstub_")
        self.store = Store(self.data)
        self.tokens = tokens or {
            "hf_testtoken": {"user": "tester", "role": "write"},
            "hf_readtoken": {"user": "tester", "role": "read"},
            "hf_othertoken": {"user": "other", "role": "write"},
        }
        self.orgs = orgs or {"acme": ["tester"]}
        self.page_size, self.lfs_threshold, self.multipart, self.part = page_size, lfs_threshold, multipart, part
        self.resolve_cache, self.serve_xet, self.xet_ttl = resolve_cache, serve_xet, xet_ttl
        self.key, self.uploads, self.faults, self.requests, self.flock = (
            secrets.token_bytes(16),
            {},
            [],
            [],
            threading.Lock(),
        )
        self.servers, self.busy = [], 0
        self.main = self.bind(host, port, "hub")
        self.url = f"http://{host}:{self.main.server_address[1]}"
        self.cdn_port = None
        self.cdn = self.url + "/_storage"  # replaced below when storage has its own origin
        if cdn_port is not None:
            s = self.bind(host, cdn_port, "cdn")
            self.cdn_port = s.server_address[1]
            self.cdn = f"http://{host}:{self.cdn_port}"

    def bind(self, host, port, role):
        s = Server((host, port), Handler)
        s.hub, s.role = self, role
        self.servers.append(s)
        return s

    def start(self):
        for s in self.servers:
            threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        for s in self.servers:
            s.shutdown()
            s.server_close()
        if self.tmp:
            shutil.rmtree(self.data, ignore_errors=True)

    __enter__ = start

    def __exit__(self, *a):
        self.stop()

    def sign(self, text):
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()[:32]

    def cdn_url(self, path, ttl=3600):
        path += ("&" if "?" in path else "?") + f"exp={int(time.time()) + ttl}"
        return f"{self.cdn}{path}&sig={self.sign(path)}"

    def cdn_link(self, sha, name=None):
        return self.cdn_url(
            f"/get/{sha}" + (f"?cd={quote(f'inline; filename={chr(34)}{name}{chr(34)};')}" if name else "")
        )

    def signed(self, path):
        m = re.fullmatch(r"(.*[?&]exp=(\d+))&sig=(\w+)", path)
        return bool(m) and int(m[2]) > time.time() and hmac.compare_digest(m[3], self.sign(m[1]))

    def fault(self, kind, path=".*", method=".*", times=1, skip=0, **params):
        f = {"kind": kind, "path": path, "method": method, "times": times, "skip": skip, "hits": 0, **params}
        with self.flock:
            self.faults.append(f)
        return f

    def clear(self):
        with self.flock:
            self.faults.clear()

    def pick_fault(self, method, path, rng):
        with self.flock:
            for f in self.faults:
                if (
                    f["times"]
                    and re.search(f["path"], path)
                    and re.fullmatch(f["method"], method)
                    and (f.get("range") is None or bool(rng) == f["range"])
                ):
                    if f["skip"] > 0:
                        f["skip"] -= 1
                        continue
                    f["times"] -= 1
                    f["hits"] += 1
                    return f
        return None

    def record(self, rec):
        self.requests.append(rec)
        if len(self.requests) > 20000:
            del self.requests[:10000]
        if getattr(self, "verbose", False):
            print(json.dumps(rec), flush=True)

    def log(self, path="", method=None):
        """finished requests; waits briefly for those whose last byte the client already has"""
        end = time.time() + 0.5
        while self.busy > 0 and time.time() < end:
            time.sleep(0.01)
        return [r for r in self.requests if re.search(path, r["path"]) and method in (None, r["method"])]

    def leaked_tokens(self):
        return [r for r in self.requests if r.get("leaked_auth")]

    def reset(self):
        with self.store.lock:
            self.clear()
            self.requests.clear()
            for d in ("blob", "lfs", "tmp", "xorb"):
                shutil.rmtree(os.path.join(self.data, d), ignore_errors=True)
            if os.path.exists(os.path.join(self.data, "state.json")):
                os.unlink(os.path.join(self.data, "state.json"))
            self.store.__init__(self.data)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--port", type=int, default=8089)
    ap.add_argument("--cdn-port", type=int, default=0, help="second origin for large files (0 = any free port)")
    ap.add_argument("--no-cdn", action="store_true", help="serve large files from the same origin, no redirect")
    ap.add_argument("--data", default=None, help="folder to keep repos in (default: a temporary one)")
    ap.add_argument("--fresh", action="store_true", help="empty --data first")
    ap.add_argument("--token", action="append", default=[], metavar="TOKEN:USER:ROLE")
    ap.add_argument("--page-size", type=int, default=None, help="small pages, to exercise pagination")
    ap.add_argument("--lfs-threshold", type=int, default=BIG)
    ap.add_argument(
        "--multipart", type=int, default=1 << 40, help="LFS objects at or above this many bytes use multipart"
    )
    ap.add_argument("--no-xet-serve", action="store_true", help="never announce xet hashes on download")
    ap.add_argument("--verbose", action="store_true", help="one JSON line per request on stdout")
    a = ap.parse_args()
    if a.fresh and a.data:
        shutil.rmtree(a.data, ignore_errors=True)
    toks = {t: {"user": u, "role": r} for t, u, r in (x.split(":") for x in a.token)} or None
    hub = Hub(
        a.data,
        a.port,
        None if a.no_cdn else a.cdn_port,
        tokens=toks,
        page_size=a.page_size,
        lfs_threshold=a.lfs_threshold,
        multipart=a.multipart,
        serve_xet=not a.no_xet_serve,
    )
    hub.verbose = a.verbose
    hub.start()
    print(f"READY {hub.url} cdn={hub.cdn} data={hub.data} tokens={','.join(hub.tokens)}", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
