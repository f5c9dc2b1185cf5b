"""A hub on the loopback that has one model, as huggingface_hub downloads it."""

import hashlib
import json
from pathlib import Path

from loopback import LoopbackHandler, LoopbackServer

MODEL = "team/model"
COMMIT = "0" * 39 + "1"


class ModelHandler(LoopbackHandler):
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
            return self.send(body=body, status=404, more={"X-Error-Code": "EntryNotFound"})
        hub.sent.add(name)
        data = (hub.folder / name).read_bytes()
        digest = hashlib.sha1(data).hexdigest()
        more = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        return self.send(data, body=body, more=more)


class ModelHub(LoopbackServer):
    """Serves the files of a folder as MODEL; sent: those that were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ModelHandler)
        self.folder, self.sent = folder, set()
        self.start()

    def list_files(self) -> list[Path]:
        return sorted(each for each in self.folder.rglob("*") if each.is_file())
