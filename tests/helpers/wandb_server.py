"""A W&B server in memory: what a run and `wandb sync` need of one."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = {"id": "1", "name": "somebody"}
OPERATIONS = {  # of GraphQL; any other, those of artifacts among them, is refused
    "RunResumeStatus": "resume_status",
    "UpsertBucket": "upsert_run",
    "CreateRunFiles": "take_files",
}


@dataclass
class Run:
    """What was uploaded under one id."""

    about: dict = field(default_factory=dict)  # the last value that was given of each
    starts: int = 0  # how often it was begun or resumed
    history: dict[int, dict] = field(default_factory=dict)  # line number -> row
    exit_code: int | None = None


class Server(ThreadingHTTPServer):
    """Runs by id at `url`; answers all with `status` where that is set (401: a wrong key)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}
        self.status: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status:
            return self.reply({"errors": [{"message": "refused"}]}, self.server.status)
        if self.path.endswith("/file_stream"):
            return self.reply(self.stream(self.path.split("/")[-2], json.loads(raw)))
        if self.path != "/graphql":
            return self.reply({})
        asked = json.loads(raw)
        if asked["operationName"] not in OPERATIONS:
            return self.reply({"errors": [{"message": "is not known here"}]})
        answer = getattr(self, OPERATIONS[asked["operationName"]])
        return self.reply({"data": answer(**asked["variables"])})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    do_GET = do_PUT  # noqa: N815

    def resume_status(self, name: str, **_) -> dict:
        run, bucket = self.server.runs.get(name), None
        if run:
            rows = run.history
            bucket = {
                "id": name,
                "name": name,
                "summaryMetrics": "{}",
                "displayName": run.about["displayName"],
                "logLineCount": 0,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(rows[max(rows)])] if rows else []),
                "eventsTail": "[]",
                "config": run.about["config"],
                "tags": run.about.get("tags", []),
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "1", "name": "ldm", "entity": ENTITY, "bucket": bucket}}

    def upsert_run(self, name: str, **about) -> dict:
        new = name not in self.server.runs
        run = self.server.runs.setdefault(name, Run())
        run.starts += "host" in about and about["displayName"] is not None
        run.about |= {key: value for key, value in about.items() if value is not None}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.about.get("displayName"),
            "config": run.about["config"],
            "project": {"id": "1", "name": "ldm", "entity": ENTITY},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def take_files(self, files: list[str], **_) -> dict:
        made = [{"name": name, "uploadUrl": f"{self.server.url}/upload"} for name in files]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": made}}

    def stream(self, name: str, sent: dict) -> dict:
        run = self.server.runs[name]
        part = (sent.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(part["content"], part["offset"]):
            run.history[number] = json.loads(line)
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return {}

    def reply(self, answer: dict, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server that is gone when the block ends."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
