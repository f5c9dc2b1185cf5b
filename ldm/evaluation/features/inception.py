"""The features that FID is defined on, and where their weights are found.

The weights are Google's (Apache-2.0), as torch-fidelity and pytorch-fid publish them in one and the
same file. Shapes: n images, D features (2048), K classes (1008).
"""

import hashlib
import urllib.request
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ldm.evaluation.features.base import Features
from ldm.evaluation.features.inception_v3 import SIZE, WIDTH, Inception
from ldm.utils.files import located

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d"  # what it begins with
NAMES = (URL.rpartition("/")[2], f"pt_inception-2015-12-05-{SHA256}.pth")  # and pytorch-fid's
PATIENCE = 5.0  # seconds until a server must have answered


class InceptionFeatures(Features):
    """The 2048 pooled features of FID's InceptionV3, of pixels resized as clean-fid does it.

    path: the weights' file. By default it is where torch.hub, torch-fidelity and pytorch-fid keep
    it (~/.cache/torch/hub/checkpoints, or below $TORCH_HOME), and fetched to there once.
    Raises FileNotFoundError where there is no such file and none can be fetched, ValueError where
    the file does not hold this network. Another file than the published one is told by a warning.
    """

    def __init__(self, path: str | None = None) -> None:
        file = _cached() if path is None else located(path)
        if not file.is_file():
            raise FileNotFoundError(f"no InceptionV3 weights at '{file}': {_where()}")
        net = load(file)
        super().__init__(
            net,
            net,
            name="inception",
            width=WIDTH,
            size=SIZE,
            mean=(128.0,) * 3,
            std=(128.0,) * 3,
            reads="InceptionV3 of 2015-12-05, the 2048 features of the last pool",
        )

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Class logits (n, K), float32, of features (n, D): what the inception score is made of.

        Without the bias, as in the score's first implementation (Salimans et al. 2016) and since.
        """
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.net.fc.weight.T.to(features.device)


def load(file: Path) -> Inception:
    """The network with the weights in a file; no pickle is executed.

    Raises ValueError where the file does not hold them, or is damaged.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        net = Inception()
        net.load_state_dict(state)
    except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"'{file}' does not hold the weights of FID's InceptionV3 ({reason}): {_where()}"
        ) from error
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(SHA256):
        warnings.warn(
            f"'{file}' is not the published file (its sha256 begins with {found[:8]}, not "
            f"{SHA256}): distances on it compare with one another, and with no published FID",
            stacklevel=3,
        )
    return net


def _cached() -> Path:
    """The published file, fetched where it is not here yet."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    try:
        # torch.hub waits for as long as a silent network keeps it, so ask first.
        question = urllib.request.Request(URL, method="HEAD")
        urllib.request.urlopen(question, timeout=PATIENCE).close()
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(folder / NAMES[0]), hash_prefix=SHA256)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"FID needs the weights of its InceptionV3 (95 MB), which are not at "
            f"'{folder / NAMES[0]}' and cannot be fetched ({error}): {_where()}"
        ) from error
    return folder / NAMES[0]


def _where() -> str:
    place = Path(torch.hub.get_dir()) / "checkpoints" / NAMES[0]
    return f"fetch {URL} on a machine with a network and put it at '{place}', or give path=FILE"
