"""A loopback server that speaks as much of the hub's HTTP interface as an upload needs."""

import base64
import http.server
import json
import threading
from typing import Any


class HubServer(http.server.ThreadingHTTPServer):
    """Knows one account and its repositories; keeps the files that it is sent."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by their hash, before a commit names them."""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        """Tell who asks, or what a repository holds."""
        if not self._is_known():
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            return self._send({"name": "org", "type": "user", "orgs": []})
        name = "/".join(parts[2:4])
        files = self.server.repositories.get(name)
        if files is None:
            return self._send({"error": "Repository not found"}, 404, "RepoNotFound")
        siblings = [{"rfilename": file} for file in files]
        if "tree" in parts:
            found = [{"type": "file", "path": f, "size": len(files[f]), "oid": "0"} for f in files]
            return self._send(found)
        self._send({"id": name, "sha": "0" * 40, "siblings": siblings, "tags": []})

    def do_PUT(self) -> None:
        """Take a large file."""
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._send({})

    def do_POST(self) -> None:
        """Make a repository, or take a commit and what comes before it."""
        body = self._body()
        if not self._is_known():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "org", asked["name"])))
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            self.server.private[name] = asked.get("visibility") == "private"
            return self._send({"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._send({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            found = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": found})
        self._commit(body)

    def _commit(self, body: bytes) -> None:
        name = "/".join(self.path.split("/")[3:5])
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        self._send({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    def _is_known(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {self.server.token}":
            return True
        self._send({"error": "Invalid username or password."}, 401)
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, value: Any, code: int = 200, error: str = "") -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
