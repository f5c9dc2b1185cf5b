import itertools
import time

import pytest
from bad_sample_runs import fit
from hypothesis import given
from hypothesis import strategies as st
from material import picture, samples, tar_bytes

from ldm.data.position_sampler import ShuffledOrder
from ldm.data.shards import remote
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.prefetch import ShardPrefetcher
from ldm.data.shards.remote import RemoteError, describe_urls

SIZE = len(tar_bytes(samples(3)))


def wait_for(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def served(web, tmp_path, count: int, per_shard: int = 3) -> tuple[str, str]:
    """The same shards on the server and in a folder."""
    folder = tmp_path / "local"
    folder.mkdir()
    for n in range(count):
        data = tar_bytes(samples(per_shard, first=per_shard * n))
        web.files[f"/{n:02}.tar"] = data
        (folder / f"{n:02}.tar").write_bytes(data)
    return web.url("/{%02d..%02d}.tar" % (0, count - 1)), str(folder)  # noqa: UP031


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum),
    st.integers(1, 9), st.integers(0, 99),
)  # fmt: skip
def test_upcoming_shards_are_those_that_the_order_reads(sizes, window, position):
    order = ShuffledOrder(sizes, seed=4, window=window)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    horizon = (position // len(order) + 3) * len(order)
    upcoming = list(itertools.takewhile(lambda x: x[0] <= horizon, order.shards_from(position)))
    ends = [end for end, _ in upcoming]
    assert ends == sorted(ends)
    for p in range(position, horizon):
        end = min(end for end in ends if end > p)  # of the window in use
        assert (end, shard_of[order.at(p)[1]]) in upcoming


def test_the_next_shards_come_in_order_and_not_too_many(web, tmp_path):
    shards = describe_urls(_urls(web, 12))
    web.seen.clear()
    cache = ShardCache(tmp_path / "cache", gigabytes=(8 * SIZE + 10) / 1e9)
    ahead = ShardPrefetcher(
        cache, ((3 * n + 3, shards[n % 12]) for n in itertools.count()), window=1
    )
    try:
        ahead.advance_to(0)
        wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == 4)  # half of the cache
        ahead.advance_to(6)
        wait_for(lambda: len(list(cache.folder.glob("*.tar"))) == 6)
        time.sleep(0.2)
        fetched = [name for method, name, _ in web.seen if method == "GET"]
        assert sorted(fetched[:4]) == [f"/{n:02}.tar" for n in range(4)]
        assert sorted(fetched[4:]) == ["/04.tar", "/05.tar"]
    finally:
        ahead.close()


def _urls(web, count: int) -> list[str]:
    for n in range(count):
        web.files[f"/{n:02}.tar"] = tar_bytes(samples(3, first=3 * n))
    return [web.url(name) for name in web.files]


def test_the_process_ends_with_its_parent(web, tmp_path):
    shards = describe_urls(_urls(web, 2))
    ahead = ShardPrefetcher(
        ShardCache(tmp_path, gigabytes=1),
        ((n, shards[n % 2]) for n in itertools.count(1)),
        window=1,
    )
    ahead.advance_to(0)
    process = ahead._process
    process.stdin.close()  # as the death of this process would
    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_server_sees_what_a_local_run_sees(web, tmp_path, workers):
    """Through a cache that holds a third of the shards, twice over, from a server that stumbles."""
    url, folder = served(web, tmp_path, 9)
    _, local = fit(folder, workers=0, steps=11, window=2)
    count = itertools.count(1)
    web.fault = lambda *request: ("500", "reset")[next(count) % 2] if next(count) % 9 < 2 else None
    cache = str(tmp_path / "cache")
    _, over_http = fit(
        url, workers=workers, steps=11, window=2, cache=cache, cache_gb=(3 * SIZE + 10) / 1e9
    )
    assert over_http.keys == local.keys
    assert over_http.validated == local.validated


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_buckets_on_a_server_sees_what_a_local_run_sees(web, tmp_path, workers):
    """Through a cache that holds a third of the shards; samples of the rare bucket are carried."""
    (tmp_path / "local").mkdir()
    for n in range(9):
        members = [
            (f"{i}.{kind}", picture(i, (16, 8) if i == 10 else (8, 8)) if kind == "png" else b"t")
            for i in range(3 * n, 3 * n + 3)
            for kind in ("png", "txt")
        ]
        web.files[f"/{n:02}.tar"] = tar_bytes(members)
        (tmp_path / "local" / f"{n:02}.tar").write_bytes(tar_bytes(members))
    options = {"buckets": [[8, 8], [16, 8]], "steps": 40, "window": 2}
    _, local = fit(tmp_path / "local", workers=0, **options)
    assert local.keys.count("10") == 5
    cache = {"cache": str(tmp_path / "cache"), "cache_gb": (3 * SIZE + 10) / 1e9}
    url = web.url("/{00..08}.tar")
    _, over_http = fit(url, workers=workers, **options, **cache)
    assert over_http.keys == local.keys


def test_a_server_lost_in_mid_run_is_named(web, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_WAIT", 0.01)
    url, _ = served(web, tmp_path, 9)
    options = {"window": 1, "cache": str(tmp_path / "cache"), "cache_gb": (3 * SIZE + 10) / 1e9}
    fit(url, steps=1, workers=0, **options)  # the index is there, and some of the shards
    for file in (tmp_path / "cache").glob("*05.tar"):
        file.unlink()
    web.fault = lambda method, name, _: "500" if (method, name) == ("GET", "/05.tar") else None
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:\d+/05\.tar"):
        fit(url, steps=9, workers=0, **options)
