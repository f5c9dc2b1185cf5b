"""A hub on the loopback that has one model, as huggingface_hub downloads it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "team/model"
COMMIT = "0" * 39 + "1"


class ModelHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub: ModelHub = self.server
        path = self.path.partition("?")[0]
        names = [each.relative_to(hub.folder).as_posix() for each in hub.list_files()]
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            sizes = [(hub.folder / name).stat().st_size for name in names]
            facts = zip(names, sizes, strict=True)
            found = [{"type": "file", "path": n, "size": size, "oid": "0"} for n, size in facts]
            return self.send(json.dumps(found).encode(), body=body)
        if path.startswith(f"/api/models/{MODEL}"):
            siblings = [{"rfilename": name} for name in names]
            facts = {"id": MODEL, "sha": COMMIT, "siblings": siblings}
            return self.send(json.dumps(facts).encode(), body=body)
        name = path.removeprefix(f"/{MODEL}/resolve/").partition("/")[2]
        if name not in names:
            return self.send(b"", body=body, status=404, more={"X-Error-Code": "EntryNotFound"})
        hub.sent.add(name)
        data = (hub.folder / name).read_bytes()
        digest = hashlib.sha1(data).hexdigest()
        more = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        return self.send(data, body=body, more=more)

    def send(self, data: bytes, *, body: bool, status: int = 200, more=()) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(more).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


class ModelHub(ThreadingHTTPServer):
    """Serves the files of a folder as MODEL; sent: those that were asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), ModelHandler)
        self.folder, self.sent = folder, set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def list_files(self) -> list[Path]:
        return sorted(each for each in self.folder.rglob("*") if each.is_file())
