"""A server on this machine that answers as the Hugging Face hub does for one data set."""

import hashlib
import http.server
import json
import re
import urllib.parse


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
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, request_range = self.server, self.headers.get("Range")
        hub.requests.append((self.command, self.path, request_range))
        if hub.trouble and (answer := hub.trouble(self, len(hub.requests))):
            return
        api, resolve = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/{hub.revision}/"
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path == "/":
            self.answer(200)
        elif path in (api, f"{api}/revision/{hub.revision}", f"{api}/revision/main"):
            answer = {"id": hub.repository, "sha": hub.newest if path == api else hub.revision, "siblings": []}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        elif match := re.fullmatch(rf"{api}/tree/{hub.revision}/?(.*)", path):
            entries = self.tree(match[1], recursive="recursive=true" in self.path.lower())
            if entries:
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")
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
            known = path.startswith((api + "/", resolve))
            self.answer(404, b"{}", X_Error_Code="EntryNotFound" if known else "RepoNotFound")

    def do_POST(self):  # paths-info
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.command, self.path, query))
        if self.headers["Content-Type"] == "application/json":
            names = json.loads(query)["paths"]
        else:
            names = urllib.parse.parse_qs(query)["paths"]
        entries = [entry for name in names for entry in self.tree(name.rpartition("/")[0]) if entry["path"] == name]
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def tree(self, folder, recursive=False):
        """The hub's list of what is in a folder. A folder that does not exist is empty."""
        prefix, entries = f"{folder}/" if folder else "", {}
        for name in self.server.files:
            if name.startswith(prefix):
                first, _, rest = name.removeprefix(prefix).partition("/")
                if rest:
                    entries[prefix + first] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                if recursive or not rest:
                    entries[name] = self.entry(name)
        return list(entries.values())

    def entry(self, name):
        body = self.server.files[name]
        size = len(body) + self.server.wrong_size
        lfs = {"oid": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 134}
        return {"type": "file", "oid": "0" * 40, "size": size, "path": name, "lfs": lfs}

    def is_body_of(self, number):
        path = list(self.server.files)[number]
        return self.command == "GET" and self.path.startswith("/datasets/") and path in self.path


class Hub(http.server.ThreadingHTTPServer):
    """A hub of one data set, at one commit, which is also its branch main.

    `files` maps paths to bytes. `trouble(handler, number of the request)` may answer a request instead.
    """

    daemon_threads = True

    def __init__(self, files, repository, revision):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.repository, self.revision = files, repository, revision
        self.newest = revision  # the commit that a request without a revision gets
        self.requests, self.trouble, self.wrong_size = [], None, 0
