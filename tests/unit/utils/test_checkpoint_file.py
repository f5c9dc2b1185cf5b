"""Checkpoint files under damage, code in place of data, and kills."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.training.callbacks.checkpoint_storage import SafeCheckpointIO
from ldm.utils.checkpoint_file import (
    CheckpointError,
    delete_checkpoint,
    export_weights,
    find_checkpoint,
    find_last_good_checkpoint,
    find_newest_checkpoint,
    link_checkpoint,
    link_last_checkpoint,
    load_module_state,
    manifest_path,
    parse_checkpoint_step,
    prune_checkpoints,
    read_checkpoint,
    select_prefix,
    write_checkpoint,
)
from ldm.utils.files import check_writable
from ldm.utils.hashing import hash_file, hash_module


def payload(step: int = 1, *, numbers: int = 3000) -> dict:
    return {
        "state_dict": {"a.weight": torch.full((numbers,), float(step)), "b": torch.arange(4)},
        "global_step": step,
        "ldm": {"stage": "diffusion", "config": "x: 1\n"},
    }


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "checkpoints" / "step=00000001.ckpt"
    write_checkpoint(payload(), path)
    return path


def test_a_checkpoint_is_read_as_written(file):
    got = read_checkpoint(file)
    assert torch.equal(got["state_dict"].pop("a.weight"), torch.ones(3000))
    assert torch.equal(got["state_dict"].pop("b"), torch.arange(4))
    assert got == {"state_dict": {}, "global_step": 1, "ldm": payload()["ldm"]}
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name, file.name + ".json"]


def test_a_save_that_fails_leaves_nothing(file):
    delete_checkpoint(file)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        write_checkpoint({"state_dict": {"a": torch.ones(9)}, "bad": lambda: None}, file)
    assert list(file.parent.iterdir()) == []


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def into_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def manifest(text: str) -> Callable[[Path], object]:
    return lambda path: manifest_path(path).write_text(text)


SIZE = r"it has \d+ bytes where its manifest says \d+"
DAMAGE = {
    "emptied": (cut(0), SIZE),
    "cut at 1 %": (cut(0.01), SIZE),
    "cut at 50 %": (cut(0.5), SIZE),
    "cut at 99 %": (cut(0.99), SIZE),
    "one bit": (flip_a_bit, "its content does not have the digest of its manifest"),
    "directory": (into_a_directory, "there is no such file"),
    "no file": (Path.unlink, "there is no such file"),
    "no manifest": (
        lambda path: manifest_path(path).unlink(),
        "its manifest step=00000001.ckpt.json is missing",
    ),
    "empty manifest": (manifest(""), "its manifest step=00000001.ckpt.json is damaged"),
    "half a manifest": (manifest('{"size": 1'), "its manifest step=00000001.ckpt.json is damaged"),
    "list manifest": (manifest("[]"), "its manifest step=00000001.ckpt.json is damaged"),
    "other manifest": (manifest('{"size": 1}'), "its manifest step=00000001.ckpt.json is damaged"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_named_with_the_reason(file, damage, reason):
    damage(file)
    with pytest.raises(CheckpointError, match=f"{file} cannot be used: {reason}"):
        read_checkpoint(file)


def forge(path: Path) -> None:
    """A manifest that fits what is there."""
    facts = {"size": path.stat().st_size, "sha256": hash_file(path)}
    manifest_path(path).write_text(json.dumps(facts))


def flipped(data: bytes, rng: random.Random) -> bytes:
    """With one bit changed."""
    bit = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
@pytest.mark.parametrize("what", ["cut", "flipped", "manifest flipped"])
def test_200_damages_are_found_and_the_previous_checkpoint_is_used(tmp_path, what):
    rng = random.Random(0)
    for step in (1, 2):
        save(tmp_path, step)
    before, path = (tmp_path / f"step={step:08d}.ckpt" for step in (1, 2))
    victim = manifest_path(path) if what == "manifest flipped" else path
    good = victim.read_bytes()
    for _ in range(200):
        bad = good[: rng.randrange(len(good))] if what == "cut" else flipped(good, rng)
        victim.write_bytes(bad)
        assert find_newest_checkpoint(tmp_path) == before
        with pytest.raises(CheckpointError, match=rf"{path} cannot be used: it"):
            read_checkpoint(path)
    victim.write_bytes(good)
    assert find_newest_checkpoint(tmp_path) == path


@pytest.mark.parametrize("what", ["cut", "flipped"])
def test_200_damages_under_a_forged_manifest_do_no_harm(tmp_path, what):
    """Whoever changes both is told so, or gets other values; nothing runs, nothing crashes."""
    rng = random.Random(0)
    save(tmp_path, 1)
    path = tmp_path / "step=00000001.ckpt"
    good = path.read_bytes()
    refused = []
    for _ in range(200):
        path.write_bytes(good[: rng.randrange(len(good))] if what == "cut" else flipped(good, rng))
        forge(path)
        try:
            assert isinstance(read_checkpoint(path), dict)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) == 200 if what == "cut" else len(refused) > 20
    assert all(f"{path} is no checkpoint of ldm" in said for said in refused)


def test_a_manifest_of_a_terabyte_is_damaged(file):
    os.truncate(manifest_path(file), 2**40)
    with pytest.raises(CheckpointError, match=r"its manifest .* is damaged"):
        read_checkpoint(file)


def test_a_manifest_that_nests_without_end_is_damaged(file):
    manifest_path(file).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"its manifest .* is damaged"):
        read_checkpoint(file)


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved_by_torch(bad: Touch, path: Path) -> None:
    write_checkpoint({"state_dict": {"a": torch.ones(2)}, "bad": bad}, path)


def saved_by_old_torch(bad: Touch, path: Path) -> None:
    torch.save({"bad": bad}, path, _use_new_zipfile_serialization=False)


def plain_pickle(bad: Touch, path: Path) -> None:
    path.write_bytes(pickle.dumps({"bad": bad}))


@pytest.mark.parametrize("save", [saved_by_torch, saved_by_old_torch, plain_pickle])
@pytest.mark.parametrize("read", [read_checkpoint, SafeCheckpointIO().load_checkpoint])
def test_pickled_code_is_not_run(tmp_path, save, read):
    path = tmp_path / "evil.ckpt"
    save(Touch(tmp_path / "executed"), path)
    forge(path)
    with pytest.raises(CheckpointError, match=rf"{path} is no checkpoint of ldm, or holds code"):
        read(path)
    assert not (tmp_path / "executed").exists()


def save(folder: Path, step: int, *, numbers: int = 10) -> None:
    """What training does at a save."""
    path = folder / f"step={step:08d}.ckpt"
    write_checkpoint(payload(step, numbers=numbers), path)
    link_last_checkpoint(path)
    prune_checkpoints(folder, 2)


def in_child(work: Callable[[], None]) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def whole(path: Path) -> int:
    """The step of a checkpoint, after a look at its content."""
    got = read_checkpoint(path)
    assert (got["state_dict"]["a.weight"] == got["global_step"]).all()
    return got["global_step"]


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.symlink"}


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "the next step"])
def test_a_kill_at_any_file_operation_leaves_a_checkpoint(tmp_path, step):
    """The child kills itself just before the n-th operation of the save, for every n."""

    def save_until(n: int) -> None:
        left = iter(range(n))

        def hook(event: str, _) -> None:
            if event in FILE_EVENTS and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(folder, step)

    for n in range(100):
        folder = tmp_path / str(n)
        save(folder, 1)
        save(folder, 2)
        child = in_child(lambda n=n: save_until(n))
        child.join()
        found = {whole(find_newest_checkpoint(folder))}
        found |= {whole(folder / "last.ckpt")} if step > 2 else set()
        assert found <= {1, 2, step}, f"killed at operation {n}"
        save(folder, step)
        assert whole(find_newest_checkpoint(folder)) == whole(folder / "last.ckpt") == step
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert n >= 6  # open and rename of both files, link and rename of last.ckpt


def test_a_kill_at_any_time_leaves_a_checkpoint(tmp_path):
    numbers, step = 500_000, 1
    save(tmp_path, step, numbers=numbers)
    for _ in range(20):
        begun = multiprocessing.get_context("fork").Event()

        def save_forever(first: int = step + 1, begun=begun) -> None:
            for next_step in range(first, 10**8):
                begun.set()
                save(tmp_path, next_step, numbers=numbers)

        child = in_child(save_forever)
        assert begun.wait(30)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        before, step = step, whole(tmp_path / "last.ckpt")
        assert step >= before
        prune_checkpoints(tmp_path, 2)  # a newer one without manifest would be passed over
        assert whole(find_newest_checkpoint(tmp_path)) >= step
    save(tmp_path, step + 1, numbers=numbers)
    assert whole(tmp_path / "last.ckpt") == step + 1
    assert len(list(tmp_path.glob("step=*.ckpt"))) == 2


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step=00000002.ckpt")
    with pytest.warns(
        UserWarning,
        match=r"step=00000002.ckpt is passed over: its content does.* step=00000001.ckpt is taken "
        "in its place: what was trained from step 1 to 2 is lost",
    ):
        assert whole(find_newest_checkpoint(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
def test_only_damaged_checkpoints_are_an_error(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        cut(0.5)(tmp_path / f"step={step:08d}.ckpt")
    with pytest.raises(CheckpointError, match=rf"none of the 2 checkpoints in {tmp_path} is whole"):
        find_newest_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("step=*.ckpt"))) == 2


def test_a_folder_without_checkpoints_returns_none(tmp_path):
    assert find_newest_checkpoint(tmp_path / "nothing") is None


def test_the_final_checkpoint_of_a_step_is_the_newer_one(tmp_path):
    save(tmp_path, 1)
    write_checkpoint(payload(2), tmp_path / "step=00000001_end.ckpt")
    assert whole(find_newest_checkpoint(tmp_path)) == 2


def test_last_is_a_link_that_survives_a_move(file, tmp_path):
    link_last_checkpoint(file)
    second = file.with_name("step=00000002.ckpt")
    write_checkpoint(payload(2), second)
    link_last_checkpoint(second)
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    assert read_checkpoint(tmp_path / "moved" / "last.ckpt")["global_step"] == 2


def test_spared_checkpoints_are_not_pruned(tmp_path):
    for step in range(1, 6):
        write_checkpoint(payload(step), tmp_path / f"step={step:08d}.ckpt")
    (tmp_path / "step=00000000.ckpt").mkdir()  # nothing of ours
    prune_checkpoints(tmp_path, 2, spare=["step=00000002.ckpt"])
    left = sorted(path.name for path in tmp_path.glob("step=*.ckpt"))
    assert [int(name[5:13]) for name in left] == [0, 2, 4, 5]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting takes rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_older_checkpoints(small_disk):
    first, second = (small_disk / f"step={step:08d}.ckpt" for step in (1, 2))
    write_checkpoint(payload(1, numbers=150_000), first)
    with pytest.raises(OSError, match=r"No space left on device \(\d+ bytes are free\)"):
        write_checkpoint(payload(2, numbers=150_000), second)
    assert sorted(path.name for path in small_disk.iterdir()) == [first.name, f"{first.name}.json"]
    assert whole(find_newest_checkpoint(small_disk)) == 1


def test_an_unwritable_folder_is_refused_with_a_remedy(tmp_path, small_disk):
    check_writable(tmp_path / "new" / "checkpoints")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"cannot be written to .*/file/checkpoints \(Not a directory"
    ):
        check_writable(tmp_path / "file" / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"cannot be written to .* \(Read-only file system\): make "):
        check_writable(small_disk / "checkpoints")


def test_export_writes_the_weights_alone(tmp_path):
    average = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    full = payload() | {"state_dict": {"denoiser.a": torch.ones(1), "ema.module.a": average}}
    export_weights(full, tmp_path / "weights" / "x.safetensors")
    weights = load_file(tmp_path / "weights" / "x.safetensors")
    assert weights.keys() == {"a"}
    assert torch.equal(weights["a"], average)
    facts = json.loads((tmp_path / "weights" / "x.json").read_text())
    assert facts == {"step": 1, "stage": "diffusion", "config": "x: 1\n"}


def test_find_checkpoint_accepts_a_file_or_a_run(file, tmp_path):
    link_last_checkpoint(file)
    assert find_checkpoint(str(tmp_path)) == file
    assert find_checkpoint(str(file)) == file
    link_checkpoint(file, "best.ckpt")
    assert find_checkpoint(f"{file.parent}/best.ckpt").resolve() == file


def test_a_copy_without_its_manifest_is_checked_by_its_own_checksums(file, tmp_path):
    copy = tmp_path / "best.ckpt"
    copy.write_bytes(file.read_bytes())
    assert read_checkpoint(copy)["global_step"] == 1
    for damage in (flip_a_bit, cut(0.5)):
        damage(copy)
        with pytest.raises(CheckpointError, match=r"does not have its checksums|is not whole"):
            read_checkpoint(copy)
    write_checkpoint({**payload(), "state_dict": {"a": torch.tensor([float("nan")])}}, copy)
    manifest_path(copy).unlink()
    with pytest.raises(CheckpointError, match="its weights are not finite"):
        read_checkpoint(copy)


def test_find_checkpoint_names_the_nearest(file, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match=r"new' has no checkpoint \(yet\) in .*/checkpoints"):
        find_checkpoint(str(tmp_path / "new"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"ckpt='typo' is neither a run directory nor a file$"
    ):
        find_checkpoint("typo")
    other = tmp_path / "runs" / "first" / "checkpoints" / "step=00000001.ckpt"
    write_checkpoint(payload(), other)
    link_last_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"neither .*; the nearest here: runs/first$"):
        find_checkpoint("typo")


def test_delete_removes_the_manifest(file):
    delete_checkpoint(file)
    assert list(file.parent.iterdir()) == []
    delete_checkpoint(file)


def holder(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_a_digest_is_of_names_types_shapes_and_values():
    zeros = torch.zeros(2, 3)
    almost = zeros.clone()
    almost[1, 2] = 1e-45
    others = [
        holder(b=zeros),
        holder(a=zeros.int()),  # the same bytes
        holder(a=zeros.T),
        holder(a=almost),
        holder(a=zeros, b=torch.tensor(0)),
        holder(),
    ]
    digests = {hash_module(module) for module in [holder(a=zeros), *others]}
    assert len(digests) == 1 + len(others)


def test_a_digest_is_the_same_in_any_layout_and_order():
    conv = nn.Conv2d(3, 4, 3).bfloat16()
    before = hash_module(conv)
    assert hash_module(conv.to(memory_format=torch.channels_last)) == before
    a, b = torch.ones(2), torch.tensor(True)
    assert hash_module(holder(a=a, b=b)) == hash_module(holder(b=b, a=a))


def test_load_module_state_loads():
    linear = nn.Linear(2, 3)
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_module_state(linear, state, what="x")
    assert (linear.weight == 1).all()


def test_load_module_state_names_the_differences():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    state = {"0.weight": torch.ones(5, 2), "extra": torch.ones(1), "1.weight": torch.ones(4, 3)}
    with pytest.raises(CheckpointError) as caught:
        load_module_state(net, state, what="run/last.ckpt")
    assert str(caught.value) == (
        "run/last.ckpt does not fit: 0.bias is missing; 1.bias is missing; extra is unknown "
        "and 1 more"
    )
    with pytest.raises(CheckpointError, match=r"weight is \(5, 2\) in the file and \(3, 2\) here"):
        load_module_state(
            nn.Linear(2, 3), {"weight": torch.ones(5, 2), "bias": torch.ones(3)}, what="x"
        )


def test_select_prefix_removes_the_prefix():
    state = {"net.a": 1, "net.net.b": 2, "network.c": 3, "ema.net.a": 4}
    assert select_prefix({"state_dict": state}, "net.") == {"a": 1, "net.b": 2}


def test_nonfinite_weights_are_no_valid_checkpoint(tmp_path):
    good, bad = (tmp_path / f"step=0000000{n}.ckpt" for n in (1, 2))
    write_checkpoint(payload(1), good)
    ruined = payload(2)
    ruined["state_dict"]["a.weight"][7] = torch.nan
    write_checkpoint(ruined, bad)  # as runs from before the check have left them
    with pytest.raises(
        CheckpointError,
        match=r"step=00000002.ckpt cannot be used: its weights are not finite: .* good one in its "
        r"folder is step=00000001.ckpt$",
    ):
        read_checkpoint(bad)
    with pytest.warns(UserWarning, match=r"passed over: its weights are not finite.* 1 to 2 is lo"):
        assert find_newest_checkpoint(tmp_path) == good
    assert find_last_good_checkpoint(tmp_path) == good


def test_a_manifest_says_that_the_weights_are_finite(tmp_path):
    path = tmp_path / "x.ckpt"
    told = payload()
    told["ldm"]["finite"] = True
    write_checkpoint(told, path)
    assert json.loads(manifest_path(path).read_text())["finite"] is True


def test_doubtful_checkpoints_do_not_count_when_pruning(tmp_path):
    for step in range(1, 8):
        write_checkpoint(payload(step), tmp_path / f"step=0000000{step}.ckpt")
    prune_checkpoints(tmp_path, 2, doubtful_from=4)
    assert [parse_checkpoint_step(path) for path in sorted(tmp_path.glob("*.ckpt"))] == [2, 3, 7]
    assert find_last_good_checkpoint(tmp_path, before=4).name == "step=00000003.ckpt"
