"""Several caches in one run, each with a weight."""

import numpy as np
from synthetic_caches import write_synthetic_cache

from ldm.data.bucket_order import BucketedOrder
from ldm.data.cached.datamodule import cached_data
from ldm.data.cached.manifest import open_cache

BUCKETS = [[16, 16], [24, 16]]


def test_caches_have_weights_and_each_batch_one_bucket(tmp_path):
    for name, counts in (("a", (7, 5)), ("b", (8,))):
        write_synthetic_cache(tmp_path / name, counts=counts, buckets=BUCKETS)
    source = [{"path": str(tmp_path / "a"), "weight": 0.5}, {"path": str(tmp_path / "b")}]
    data = cached_data(train=source, val=str(tmp_path / "a"), batch_size=4, workers=0)
    assert data.order.rules()["order"]["batch"] == 4
    assert len(data.order) == 6 + 8
    expected = BucketedOrder(
        [7, 5, 8], np.arange(20) % 12 % 2, batch=4, seed=0, data_sets=[(2, 0.5), (1, 1.0)]
    )
    for first in range(0, 40, 4):
        at = [(data.order.at(p)[1], p) for p in range(first, first + 4)]
        assert at == [(expected.at(p)[1], p) for p in range(first, first + 4)]
        batch = data.train_set.read_batch(at)
        assert len({(int(key) % 2) for key in batch["key"]}) == 1


def test_caches_of_one_bucket_go_together(tmp_path):
    for name in ("a", "b"):
        write_synthetic_cache(tmp_path / name, counts=(2,), buckets=[[24, 16]])
    assert open_cache([str(tmp_path / "a"), str(tmp_path / "b")]).image_sizes == [(24, 16)]
