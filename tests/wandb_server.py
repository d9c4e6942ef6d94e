"""A loopback server that speaks as much of W&B's HTTP interface as a real client needs for a run.

It keeps what it is sent, and can fall ill in the middle: answer 500, keep clients waiting, or die.
"""

import gzip
import http.server
import json
import re
import ssl
import threading
import time
from typing import Any

PROJECT = {"id": "p", "name": "orpo_lab", "entity": {"id": "e", "name": "me"}}
SWEEP = "a-sweep"


class WandbServer(http.server.ThreadingHTTPServer):
    """Knows runs by id, with their configuration, history lines and exit code."""

    daemon_threads = True

    def __init__(self, secured_by: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        if secured_by:
            self.url = self.url.replace("http:", "https:")
            self.socket = secured_by.wrap_socket(self.socket, server_side=True)
        self.health = "good"
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: list[str] = []
        self.received: list[bytes] = []
        self.views: list[dict[str, Any]] = []
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.commands: list[dict[str, Any]] = []
        """What agents are told, one each time they ask and have no run."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def die(self) -> None:
        """Refuse connections from now on."""
        self.shutdown()
        self.server_close()

    def run(self, name: str) -> dict[str, Any]:
        """Return what is known of a run."""
        return self.runs.setdefault(name, {"history": [], "exit_code": None, "upserts": []})

    def _resume_status(self, name: str) -> dict[str, Any] | None:
        """Return what a client asks before it goes on with a run; None: there is none."""
        if name not in self.runs:
            return None
        history = self.runs[name]["history"]
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in history[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(history[-1]) if history else "{}",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        if "upsertSweep" in query:
            self.sweeps[SWEEP] = variables
            sweep = {"name": SWEEP, "project": PROJECT}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if "sweep(sweepName" in query:
            known = self.sweeps[variables["sweep"]]
            sweep = {"id": SWEEP, "name": SWEEP, "state": "RUNNING", "config": known["config"]}
            return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            # One run at a time, as W&B tells an agent; to exit beside a run would kill it
            is_idle = not json.loads(variables["runState"])
            told = [self.commands.pop(0)] if self.commands and is_idle else []
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(told)}}
        if "upsertBucket" in query:
            name = variables.get("name") or variables["id"]
            self.run(name)["upserts"].append(variables)
            bucket = {
                "id": name,
                "name": name,
                "displayName": variables.get("displayName"),
                "description": "",
                "config": "{}",
                "sweepName": None,
                "historyLineCount": 0,
                "project": PROJECT,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": {"bucket": self._resume_status(variables["name"])}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}}}
        if "viewer" in query.lower():
            viewer = {"id": "u", "username": "me", "entity": "me", "flags": "{}"}
            viewer["teams"] = {"edges": []}  # type: ignore[assignment]
            return {"viewer": viewer, "serverInfo": {"features": []}}
        return {"serverInfo": {"features": []}}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WandbServer

    def _read(self) -> Any:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # W&B's service packs what is long
        is_packed = self.headers.get("Content-Encoding") == "gzip"
        self.server.received.append(gzip.decompress(body) if is_packed else body)
        try:
            return json.loads(body)
        except ValueError:
            return None

    def _send(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _respond(self) -> None:
        sent = self._read()
        if self.server.health == "waits":
            time.sleep(120)
        if self.server.health == "errors":
            self._send(500, {"error": "out of order"})
        elif self.path.endswith("/graphql"):
            data = self.server.answer(sent["query"], sent.get("variables") or {})
            self._send(200, {"data": data})
        elif found := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            run = self.server.run(found.group(1))
            chunk = (sent or {}).get("files", {}).get("wandb-history.jsonl", {})
            lines = [json.loads(line) for line in chunk.get("content", [])]
            if lines:  # at their offset, as the real server has them
                offset = chunk.get("offset", 0)
                run["history"][offset : offset + len(lines)] = lines
            if (sent or {}).get("complete"):
                run["exit_code"] = sent.get("exitcode")
            self._send(200, {})
        else:
            if self.command == "PUT":
                self.server.uploads.append(self.path)
            self._send(200, {})

    do_GET = do_POST = do_PUT = do_HEAD = _respond  # noqa: N815  (http.server's names)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""
