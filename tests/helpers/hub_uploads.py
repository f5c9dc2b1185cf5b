"""A hub on the loopback that takes the files of a model, as huggingface_hub uploads them."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class UploadHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub: UploadHub = self.server
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.users.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(data))
            return self.answer({"url": f"{hub.url}/team/model"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(data)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = {"commitUrl": f"{hub.url}/team/model/commit/main", "commitOid": "0" * 40}
        return self.answer(commit | {"success": True})

    def answer(self, facts: dict) -> None:
        data = json.dumps(facts).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


class UploadHub(ThreadingHTTPServer):
    """files: what was uploaded, by path; created: the requests for a new model; users: tokens."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UploadHandler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.users: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
