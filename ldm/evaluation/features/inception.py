"""The Inception features that FID is defined on, and the download of their weights.

The weights are Google's (Apache-2.0), as torch-fidelity and pytorch-fid publish them in one and the
same file. Shapes: n images, D features (2048), K classes (1008).
"""

import urllib.request
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ldm.evaluation.features.base import NetworkFeatures
from ldm.evaluation.features.inception_v3 import INCEPTION_SIZE, INCEPTION_WIDTH, InceptionV3
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_file

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_FILE_NAMES = (  # torch-fidelity's and pytorch-fid's
    INCEPTION_URL.rpartition("/")[2],
    f"pt_inception-2015-12-05-{INCEPTION_SHA256_PREFIX}.pth",
)
INCEPTION_TIMEOUT = 5.0  # seconds until a server must have answered


class InceptionFeatures(NetworkFeatures):
    """The 2048 pooled features of FID's InceptionV3, of pixels resized as in clean-fid.

    path: the weights' file; by default that of torch.hub, torch-fidelity and pytorch-fid
    (~/.cache/torch/hub/checkpoints, or below $TORCH_HOME), downloaded once.
    """

    def __init__(self, path: str | None = None) -> None:
        file = _find_or_download_inception() if path is None else resolve_path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no InceptionV3 weights at '{file}': {format_download_hint()}")
        net = load_inception(file)
        super().__init__(
            net,
            net,
            name="inception",
            width=INCEPTION_WIDTH,
            size=INCEPTION_SIZE,
            mean=(128.0,) * 3,
            std=(128.0,) * 3,
            reads="InceptionV3 of 2015-12-05, the 2048 features of the last pool",
        )

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Returns class logits (n, K), float32, of features (n, D), for the inception score.

        They are without the bias, as in the score's first implementation (Salimans et al. 2016).
        """
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.net.fc.weight.T.to(features.device)


def load_inception(file: Path) -> InceptionV3:
    """Returns the network with the weights in a file; ValueError where it does not hold them."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        net = InceptionV3()
        net.load_state_dict(state)
    except (UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"'{file}' does not hold the weights of FID's InceptionV3 ({reason}): "
            f"{format_download_hint()}"
        ) from error
    digest = hash_file(file)
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        warnings.warn(
            f"'{file}' is not the published file (its sha256 begins with {digest[:8]}, not "
            f"{INCEPTION_SHA256_PREFIX}): its distances compare with one another, and with "
            "no published FID",
            stacklevel=3,
        )
    return net


def _find_or_download_inception() -> Path:
    """Returns the published file, which it downloads where it is not here yet."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    file = folder / INCEPTION_FILE_NAMES[0]
    try:
        # torch.hub has no time limit, so a first request finds out whether the server answers.
        request = urllib.request.Request(INCEPTION_URL, method="HEAD")
        urllib.request.urlopen(request, timeout=INCEPTION_TIMEOUT).close()
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256_PREFIX
        )
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"FID needs the weights of its InceptionV3 (95 MB), which are not at '{file}' and "
            f"cannot be fetched ({error}): {format_download_hint()}"
        ) from error
    return file


def format_download_hint() -> str:
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE_NAMES[0]
    return (
        f"fetch {INCEPTION_URL} on a machine with a network and put it at '{file}', "
        "or give features.inception.path=FILE"
    )
