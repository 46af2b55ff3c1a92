"""A server on this machine that answers as the Hugging Face hub does for one data set."""

import hashlib
import http.server
import json
import re


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, request_range = self.server, self.headers.get("Range")
        hub.requests.append((self.command, self.path, request_range))
        if hub.trouble and (answer := hub.trouble(self, len(hub.requests))):
            return
        listing = f"/api/datasets/{hub.repository}/tree/{hub.revision}/{hub.folder}"
        resolve = f"/datasets/{hub.repository}/resolve/{hub.revision}/"
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path == "/":
            self.answer(200)
        elif path == listing or path.startswith(f"/api/datasets/{hub.repository}/paths-info/"):
            entries = [self.entry(name) for name in hub.files]
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif path == f"/api/datasets/{hub.repository}/revision/{hub.revision}":
            answer = {"id": hub.repository, "sha": hub.revision, "siblings": []}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        elif path.startswith(resolve) and (body := hub.files.get(path.removeprefix(resolve))):
            size, status, headers = len(body), 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            headers |= {"X_Repo_Commit": hub.revision, "X_Linked_Size": str(size), "Accept_Ranges": "bytes"}
            if request_range:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request_range).groups()
                last = min(int(last or size), size - 1)
                status, body = 206, body[int(first) : last + 1]
                headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            self.answer(status, body, **headers)
        else:
            self.answer(404, b"no such thing", X_Error_Code="EntryNotFound")

    def do_POST(self):  # paths-info
        names = self.rfile.read(int(self.headers["Content-Length"])).decode().replace("%2F", "/")
        self.server.requests.append((self.command, self.path, names))
        entries = [self.entry(name) for name in self.server.files if name in names]
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def entry(self, name):
        body = self.server.files[name]
        size = len(body) + self.server.wrong_size
        lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 134}
        return {"type": "file", "oid": "0" * 40, "size": size, "path": name, "lfs": lfs}

    def is_body_of(self, number):
        path = list(self.server.files)[number]
        return self.command == "GET" and self.path.startswith("/datasets/") and path in self.path


class Hub(http.server.ThreadingHTTPServer):
    """`files` maps paths to bytes. `trouble(handler, number of the request)` may answer a request instead."""

    daemon_threads = True

    def __init__(self, files, repository, revision, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.repository, self.revision, self.folder = files, repository, revision, folder
        self.requests, self.trouble, self.wrong_size = [], None, 0
