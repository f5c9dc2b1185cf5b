"""FID's network against torch-fidelity 0.4.0, and where its weights come from."""

import functools
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.evaluation.features import inception
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.features.inception import InceptionFeatures
from ldm.evaluation.features.inception_v3 import InceptionV3

# What torch-fidelity's FeatureExtractorInceptionV3 makes of `pictures()` with the weights of
# `filled()`: every 341st feature, and every 211th of "logits_unbiased".
FEATURES = [
    [0.0430695, 0.1241279, 0.1682943, 0.0293315, 0.0, 0.0048994, 0.0256683],
    [0.0473621, 0.1160282, 0.1495950, 0.0305088, 0.0, 0.0038774, 0.0416058],
]
LOGITS = [
    [-0.0003845, -0.1838351, 0.0832206, 0.0148583, 0.3061940],
    [0.0029254, -0.1872757, 0.0694346, 0.0212952, 0.2720875],
]

unpublished = pytest.mark.filterwarnings("ignore:.*is not the published file")


def filled() -> InceptionV3:
    """Weights that are a function of their names alone, the same on any machine."""
    net = InceptionV3()
    for name, part in net.state_dict().items():
        if not part.is_floating_point():
            continue
        phase = torch.arange(part.numel(), dtype=torch.float64) * 12.9898
        phase += len(name) + sum(map(ord, name)) * 0.37
        wave = phase.sin() * 43758.5453
        wave = 2 * (wave - wave.floor()) - 1  # in [-1, 1)
        if name.endswith(("conv.weight", "fc.weight")):
            wave *= (4 / part[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            wave = 1 + wave / 2
        elif name.endswith("bn.weight"):
            wave = 1 + wave / 4
        else:
            wave /= 10
        part.copy_(wave.reshape(part.shape))
    return net


def pictures() -> Tensor:
    """Two pictures of 299 x 299 pixels, which nothing resizes."""
    y, x = torch.meshgrid(torch.arange(299), torch.arange(299), indexing="ij")
    rows = [(x * (c + 2) + y * y // (7 + c) + 17 * c * x // (y + 1)) % 256 for c in range(3)]
    picture = torch.stack(rows)
    return torch.stack([picture, picture.flip(2).roll(31, 1) // 2]).byte()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(filled().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(file) -> FeatureExtractor:
    with pytest.warns(UserWarning, match="is not the published file.*no published FID"):
        return InceptionFeatures(str(file))


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty torch.hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_features_and_logits_are_torch_fidelitys(features):
    found = features(pictures())
    assert found.shape == (2, features.width)
    near = {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(found[:, ::341], torch.tensor(FEATURES), **near)
    logits = features.logits(found)
    assert logits.shape == (2, 1008)
    torch.testing.assert_close(logits[:, ::211], torch.tensor(LOGITS), **near)


def test_small_pictures_are_resized_as_clean_fid_does(features):
    """Bicubic and antialiased: not the TensorFlow bilinear inside torch-fidelity."""
    small = pictures()[:, :, :64, :64]
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(small.float(), (299, 299), mode="bicubic")
        other = torch.nn.functional.interpolate(small.float(), (299, 299), mode="bilinear")
        seen = features.net((wanted.clamp(0, 255) - 128) / 128)
        bilinear = features.net((other - 128) / 128)
    found = features(small)
    # torch's plain bicubic has another kernel (-0.75 in place of -0.5), so near is enough.
    assert (found - seen).norm() < 0.5 * (found - bilinear).norm()


@unpublished
def test_a_file_of_before_torch_1_6_loads(file, features, tmp_path):
    """As the published file may be: not zipped."""
    state = torch.load(file, weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert InceptionFeatures(str(tmp_path / "old.pth")).digest == features.digest


@unpublished
def test_the_digest_is_that_of_the_weights(file, features, tmp_path):
    state = torch.load(file, weights_only=True)
    state["Mixed_7c.branch_pool.bn.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    assert InceptionFeatures(str(tmp_path / "other.pth")).digest != features.digest


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_executed(tmp_path):
    torch.save({"fc.weight": Touch(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(
        ValueError, match=r"bad.pth' does not hold the weights of FID's InceptionV3"
    ):
        InceptionFeatures(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["text", "cut", "list", "keys", "empty"])
def test_another_file_is_refused(kind, file, tmp_path):
    bad = tmp_path / "bad.pth"
    if kind == "list":
        torch.save([1, 2], bad)
    elif kind == "keys":
        torch.save({"conv.weight": torch.zeros(3)}, bad)
    else:
        bad.write_bytes({"text": b"<html>", "cut": file.read_bytes()[:99999], "empty": b""}[kind])
    with pytest.raises(
        ValueError,
        match=r"bad.pth' does not hold the weights(.|\n)*give features.inception.path=FILE",
    ):
        InceptionFeatures(str(bad))


def test_a_path_to_nothing_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no InceptionV3 weights at .*fetch https://"):
        InceptionFeatures(str(tmp_path / "none.pth"))


def test_without_a_network_it_says_where_the_file_goes(cache, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(FileNotFoundError) as error:
        InceptionFeatures()
    assert f"put it at '{cache / inception.INCEPTION_FILE_NAMES[0]}'" in str(error.value)
    assert "refused" in str(error.value)


def test_a_silent_network_is_given_up(cache, monkeypatch):
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth"
        monkeypatch.setattr(inception, "INCEPTION_URL", address)
        monkeypatch.setattr(inception, "INCEPTION_TIMEOUT", 0.2)
        with pytest.raises(FileNotFoundError, match=r"cannot be fetched .*timed out"):
            InceptionFeatures()


@pytest.mark.parametrize("place", [0, 1])
def test_the_file_of_torch_fidelity_or_pytorch_fid_is_found(file, features, cache, place):
    cache.mkdir(parents=True)
    (cache / inception.INCEPTION_FILE_NAMES[place]).symlink_to(file)
    with pytest.warns(UserWarning, match="not the published file"):
        assert InceptionFeatures().digest == features.digest


def test_it_is_fetched_once_and_checked(file, features, cache, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{file.name}"
        monkeypatch.setattr(inception, "INCEPTION_URL", address)
        with pytest.raises(FileNotFoundError, match="invalid hash value"):
            InceptionFeatures()
        assert not list(cache.glob("*")), "nothing of it is left"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", digest[:8])
        assert InceptionFeatures().digest == features.digest
        server.shutdown()
    assert InceptionFeatures().digest == features.digest, "the server is gone"
