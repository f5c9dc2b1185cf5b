"""A hub on the loopback with one data set, as huggingface_hub talks to it."""

import hashlib
import json

from web import Handler, Web

REPO = "team/shards"
TOKEN = "hf_s3cret"


class HubHandler(Handler):
    def answer(self, *, body: bool) -> None:
        hub: Hub = self.server
        path = self.path.partition("?")[0]
        if hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            hub.seen.append((self.command, path, self.headers.get("Range")))
            return self.refuse(401, "RepoNotFound")
        api = f"/api/datasets/{REPO}"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            hub.seen.append((self.command, path, None))
            if revision not in hub.revisions:
                return self.refuse(404, "RevisionNotFound")
            return self.send(json.dumps({"id": REPO, "sha": "0" * 40}).encode())
        if path.startswith(f"{api}/tree/"):
            hub.seen.append((self.command, path, None))
            revision, _, folder = path.removeprefix(f"{api}/tree/").partition("/")
            found = hub.list_files(revision, folder, recursive="recursive=True" in self.path)
            return (
                self.send(json.dumps(found).encode())
                if found
                else self.refuse(404, "EntryNotFound")
            )
        if path.startswith("/api/"):
            return self.refuse(404, "RepoNotFound")
        if path not in hub.files:
            return self.refuse(404, "EntryNotFound")
        return super().answer(body=body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status=status, more={"X-Error-Code": code})


class Hub(Web):
    """private: asks for `TOKEN`; revisions: those that exist; see `Web` for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = HubHandler
        self.private, self.revisions = False, {"main"}

    def add(self, name: str, data: bytes, *, revision: str = "main") -> None:
        self.revisions.add(revision)
        self.files[f"/datasets/{REPO}/resolve/{revision}/{name}"] = data

    def list_files(self, revision: str, folder: str, *, recursive: bool) -> list[dict]:
        """What the API says of the files in a folder, and of its folders."""
        start, found = f"/datasets/{REPO}/resolve/{revision}/", {}
        inside = f"{start}{folder}/" if folder else start
        for path, data in self.files.items():
            if not path.startswith(inside):
                continue
            name, digest = path.removeprefix(start), hashlib.sha1(data).hexdigest()
            below, slash, _ = path.removeprefix(inside).partition("/")
            if slash:
                found[below] = {
                    "type": "directory",
                    "path": f"{folder}/{below}".lstrip("/"),
                    "oid": "0",
                }
            if recursive or not slash:
                found[name] = {"type": "file", "path": name, "size": len(data), "oid": digest}
        return list(found.values())


def serve_hub() -> Hub:
    hub = Hub()
    hub.start()
    return hub
