"""A hub on the loopback that takes the files of a model, as huggingface_hub uploads them."""

import base64
import json

from loopback import LoopbackHandler, LoopbackServer


class UploadHandler(LoopbackHandler):
    def do_POST(self) -> None:  # noqa: N802
        hub: UploadHub = self.server
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.users.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(data))
            return self.answer({"url": f"{hub.root}/team/model"})
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
        commit = {"commitUrl": f"{hub.root}/team/model/commit/main", "commitOid": "0" * 40}
        return self.answer(commit | {"success": True})

    def answer(self, facts: dict) -> None:
        self.send(json.dumps(facts).encode(), more={"Content-Type": "application/json"})


class UploadHub(LoopbackServer):
    """files: what was uploaded, by path; created: the requests for a new model; users: tokens."""

    def __init__(self) -> None:
        super().__init__(UploadHandler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.users: set[str | None] = set()
        self.start()
