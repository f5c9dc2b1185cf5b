import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from material import picture, samples, tar_bytes
from synthetic_caches import make_tensors, open_cached_set, repack, rewrite_header
from synthetic_caches import write_synthetic_cache as write_cache

from ldm.data.bad_samples import TooManySkippedError
from ldm.data.batch_slots import BatchDataset
from ldm.data.cached.manifest import CacheError
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import describe_crop
from ldm.data.shards.reader import ShardReader

HOW = {"dtype": "float32", "posterior": "moments", "flips": False}


def read(dataset, at):
    return dataset.unpack(dataset.read_batch(at))


def write_pictures(folder: Path, count: int, captions: int, weights=None) -> ShardReader:
    """Pictures with as many captions as the samples of a synthetic cache."""
    folder.mkdir()
    members = []
    for n in range(count):
        record = {"captions": [f"caption {k} of {n}" for k in range(captions)]}
        members += [(f"{n:04}.png", picture(n)), (f"{n:04}.json", json.dumps(record).encode())]
    (folder / "00000.tar").write_bytes(tar_bytes(members))
    return ShardReader(folder)


@pytest.mark.parametrize("dtype", ["float32", "bf16", "float16"])
@pytest.mark.parametrize("posterior", ["moments", "mean"])
def test_a_batch_has_the_numbers_that_were_stored(tmp_path, dtype, posterior):
    made = write_cache(tmp_path / "c", dtype=dtype, posterior=posterior)
    batch = read(open_cached_set(tmp_path / "c", train=False), [(i, i) for i in (3, 11, 0)])
    mean, logvar = batch["moments"]
    assert mean.dtype == torch.float32
    assert mean.is_contiguous()
    for row, i in enumerate((3, 11, 0)):
        assert torch.equal(mean[row], made[i]["mean"].float())
        if posterior == "moments":
            assert torch.equal(logvar[row], made[i]["logvar"].float())
        for name in ("tokens", "pooled"):
            assert torch.equal(batch["condition"][name][row], made[i][name][0].float())
        assert torch.equal(batch["condition"]["mask"][row], made[i]["mask"][0] != 0)
    assert (logvar is None) == (posterior == "mean")
    assert batch["key"] == ["0003", "0011", "0000"]
    assert batch["captions"] == [f"caption 0 of {i}" for i in (3, 11, 0)]
    assert batch["position"] == [3, 11, 0]


def test_captions_are_those_that_pictures_draw(tmp_path):
    made = write_cache(tmp_path / "c", counts=(6,))
    shards = write_pictures(tmp_path / "p", 6, 3)
    pictures = TextImageDataset(shards, size=8, seed=7, train=True)
    cached = open_cached_set(tmp_path / "c", seed=7)
    at = [(position * 5 % 6, position) for position in range(60)]
    batch = read(cached, at)
    assert batch["captions"] == pictures.read_batch(at)["captions"]
    assert len(set(batch["captions"])) == 18
    for row, (index, _) in enumerate(at):
        number = int(batch["captions"][row].split()[1])
        assert torch.equal(batch["condition"]["tokens"][row], made[index]["tokens"][number])
        assert torch.equal(batch["condition"]["pooled"][row], made[index]["pooled"][number])


def test_weighted_captions_are_drawn_by_their_weights(tmp_path):
    write_cache(tmp_path / "c", counts=(2,), weights=[1.0, 1e-9, 1e-9])
    batch = read(open_cached_set(tmp_path / "c"), [(0, position) for position in range(0, 80, 2)])
    assert set(batch["captions"]) == {"caption 0 of 0"}


def test_flips_are_those_that_pictures_draw(tmp_path):
    made = write_cache(tmp_path / "c", counts=(4,), flips=True)
    shards = write_pictures(tmp_path / "p", 4, 3)
    pictures = TextImageDataset(shards, size=8, seed=3, train=True, flip=0.5)
    at = [(0, position) for position in range(40)]
    mean, logvar = read(open_cached_set(tmp_path / "c", seed=3, flip=0.5), at)["moments"]
    flips = [pictures._draw_crop(*place).flip for place in at]
    assert 10 < sum(flips) < 30
    for row, flip in enumerate(flips):
        turn = "_flipped" if flip else ""
        assert torch.equal(mean[row], made[0][f"mean{turn}"])
        assert torch.equal(logvar[row], made[0][f"logvar{turn}"])


def test_flips_that_are_not_stored_are_refused(tmp_path):
    write_cache(tmp_path / "c")
    with pytest.raises(ValueError, match=r"data\.flip=0\.5: the cache has no latents of flipped"):
        open_cached_set(tmp_path / "c", flip=0.5)


def test_one_batch_has_one_size(tmp_path):
    made = write_cache(tmp_path / "c", buckets=[[16, 16], [32, 8]])
    data = open_cached_set(tmp_path / "c", train=False)
    wide = read(data, [(i, i) for i in (1, 3, 9)])
    assert wide["moments"][0].shape == (3, 3, 1, 4)
    assert torch.equal(wide["moments"][0][1], made[3]["mean"])
    square = read(data, [(i, i) for i in (0, 2)])
    assert torch.equal(square["condition"]["tokens"][1], made[2]["tokens"][0])
    with pytest.raises(CacheError, match=r"0002.*has latents of"):
        data.read_batch([(1, 1), (2, 2)])


def test_sizes_are_those_of_the_record(tmp_path):
    write_cache(tmp_path / "c", buckets=[[16, 16], [32, 8]])
    data = open_cached_set(tmp_path / "c", train=False, gives_sizes=True)
    batch = read(data, [(1, 1), (3, 3)])
    assert batch["sizes"].tolist() == [[8, 32, 0, 0, 8, 32]] * 2
    assert "sizes" not in read(open_cached_set(tmp_path / "c"), [(1, 1)])


def test_the_sizes_of_a_flipped_sample_are_those_of_the_flipped_picture(tmp_path):
    record = {"captions": ["a"] * 3, "sizes": describe_crop(53, 32, (16, 16), x=0.5, y=0.5)}
    assert record["sizes"][3] == 5
    replaced = {4: {"json": json.dumps(record).encode()}}
    write_cache(tmp_path / "c", flips=True, replaced=replaced)
    data = open_cached_set(tmp_path / "c", flip=1.0, gives_sizes=True)
    assert read(data, [(4, 4)])["sizes"].tolist() == [[32, 53, 0, 6, 16, 16]]


def test_a_sample_of_a_size_that_the_cache_has_not_is_damaged(tmp_path):
    sizes = {1: {"json": b"{}"}, 3: {"json": b'{"image_size": [4096, 4096]}'}}
    write_cache(tmp_path / "c", buckets=[[16, 16], [32, 8]], replaced=sizes)
    data = open_cached_set(tmp_path / "c", train=False, on_error="skip")
    assert data.target_sizes[:5].tolist() == [[16, 16]] * 4 + [[16, 16]]
    assert data.read_batch([(0, 0), (1, 1), (3, 3)])["key"] == ["0000", "0002", "0004"]


def test_workers_write_into_slots(tmp_path, monkeypatch):
    made = write_cache(tmp_path / "c", dtype="bf16")
    data = open_cached_set(tmp_path / "c", train=False)
    slots = torch.zeros(1, 4, 4 * data.most_bytes, dtype=torch.uint8)
    batches = BatchDataset(data, slots)

    class Worker:
        id = 0

    monkeypatch.setattr("ldm.data.batch_slots.get_worker_info", Worker)
    messages = [batches.__getitems__([(i, i) for i in at]) for at in ([0, 1], [5, 4, 3, 2])]
    assert all("rows" not in fields for *_, fields in messages)
    first, second = map(data.unpack, batches.open_batches(messages))
    assert torch.equal(first["moments"][0][1], made[1]["mean"].float())
    assert torch.equal(second["moments"][1][3], made[2]["logvar"].float())


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def damage(kind: str, tensors: dict) -> dict[str, bytes]:
    """The members of a sample that no cache has."""
    sound, nan = repack(tensors), tensors["mean"].clone()
    nan[0, 0, 0] = {"infinite latents": torch.inf}.get(kind, torch.nan)
    states = tensors["tokens"].clone()
    states[0, 1, 1] = torch.nan
    files = {
        "a pickle": pickle.dumps(Bomb()),
        "nothing": b"",
        "a cut file": sound[:-1],
        "a longer file": sound + b"\0",
        "a picture": picture(),
        "NaN latents": repack(tensors, mean=nan),
        "infinite latents": repack(tensors, mean=nan),
        "NaN states": repack(tensors, tokens=states),
        "latents of another grid": repack(tensors, mean=tensors["mean"][:, :1].clone()),
        "another type": repack(tensors, mean=tensors["mean"].half()),
        "other tensors": repack(tensors, secret=torch.zeros(2, 2)),
        "no mask": repack(tensors, mask=None),
        "states of fewer captions": repack(
            tensors, **{name: tensors[name][:2].clone() for name in ("tokens", "mask", "pooled")}
        ),
        "offsets outside": rewrite_header(
            sound, lambda header: header["mean"].update(data_offsets=[10**6, 10**6 + 48])
        ),
        "tensors that overlap": rewrite_header(
            sound, lambda header: header["mean"].update(header["logvar"])
        ),
        "a huge header": np.uint64(2**60).tobytes() + sound[8:],
    }
    records = {
        "no captions": b"{}",
        "captions that are no texts": b'{"captions": [1, 2, 3]}',
        "no json": b"\x80\x04.",
        "deep json": b'{"captions":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "bad weights": b'{"captions": ["a", "b", "c"], "caption_weights": [1, -1, 1]}',
    }
    if kind in records:
        return {"json": records[kind]}
    return {"safetensors": files[kind]}


KINDS = [
    *("a pickle", "a cut file", "a longer file", "a picture", "NaN latents", "infinite latents"),
    *("NaN states", "latents of another grid", "another type", "other tensors", "no mask"),
    *("states of fewer captions", "offsets outside", "tensors that overlap", "a huge header"),
    *("no captions", "captions that are no texts", "no json", "deep json", "bad weights"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_or_skipped(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    replaced = {4: damage(kind, make_tensors(4, 3, (2, 2), **HOW))}
    made = write_cache(tmp_path / "c", replaced=replaced)
    at = [(i, i) for i in (3, 4, 5)]
    with pytest.raises(CacheError, match=r"00000\.tar: sample '0004' .*data\.on_error=skip"):
        open_cached_set(tmp_path / "c", train=False).read_batch(at)
    batch = read(open_cached_set(tmp_path / "c", train=False, on_error="skip"), at)
    assert batch["key"] == ["0003", "0005", "0005"]
    assert batch["position"] == [3, 4, 5]
    assert torch.equal(batch["moments"][0][1], made[5]["mean"])
    (skip,) = batch["skipped"]
    assert "sample '0004'" in skip.message
    assert not Path("exploded").exists()


def test_a_sample_of_the_same_size_replaces_a_damaged_one(tmp_path):
    replaced = {2: {"safetensors": b"no"}}
    write_cache(tmp_path / "c", buckets=[[16, 16], [32, 8]], replaced=replaced)
    data = open_cached_set(tmp_path / "c", train=False, on_error="skip")
    assert data.read_batch([(2, 0)])["key"] == ["0004"]


def test_a_cache_without_a_sound_sample_ends_the_run(tmp_path):
    replaced = {i: {"safetensors": b"no"} for i in range(12)}
    write_cache(tmp_path / "c", replaced=replaced)
    data = open_cached_set(tmp_path / "c", on_error="skip")
    with pytest.raises(TooManySkippedError, match="none of the 12 samples"):
        data.read_batch([(0, 0)])


def test_a_shard_with_fewer_samples_is_refused(tmp_path):
    write_cache(tmp_path / "c")
    write_cache(tmp_path / "d", counts=(7, 4))
    (tmp_path / "c" / "00001.tar").write_bytes((tmp_path / "d" / "00001.tar").read_bytes())
    with pytest.raises(CacheError, match="has 11 samples, and 12 were written"):
        open_cached_set(tmp_path / "c")


def test_safetensors_beside_a_picture_are_not_read(tmp_path):
    members = samples(2)
    members.insert(1, ("0000.safetensors", b"features"))
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    shards = ShardReader(tmp_path)
    assert [shards.read(i).image for i in range(2)] == [picture(0), picture(1)]


def test_evaluations_need_the_pictures(tmp_path):
    write_cache(tmp_path / "c")
    with pytest.raises(ValueError, match=r"data\.train_images=SHARDS data\.val_images=SHARDS"):
        open_cached_set(tmp_path / "c").without_augmentation()
