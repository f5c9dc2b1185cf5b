"""AdamW with moments of 8 bits: near AdamW, resumed bit for bit, from files of plain tensors."""

import sys
from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from ldm.config import command_line
from ldm.config.config_check import check_config
from ldm.training.callbacks.checkpoint_storage import find_object
from ldm.training.optimizers import AdamW
from ldm.training.quantized_optimizer import AdamW8bit
from ldm.utils.errors import UsageError

STEPS = 6
torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install torchao"
)


@pytest.fixture
def _without_compiler(monkeypatch):
    """Torchao compiles its step, which takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def train(kind, steps, state=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Unflatten(1, (64, 2, 2)), nn.Conv2d(64, 32, 2))
    net.to(memory_format=torch.channels_last)
    fitted = kind(lr=1e-2, warmup=3, decay="cosine")(net.parameters(), steps=STEPS)
    optimizer, curve = fitted["optimizer"], fitted["lr_scheduler"]["scheduler"]
    first = 0
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        curve.load_state_dict(state["curve"])
        first = curve.last_epoch
    for step in range(first, steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        curve.step()
    return {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "curve": curve.state_dict(),
    }


@torchao
@pytest.mark.usefixtures("_without_compiler")
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path):
    torch.save(train(AdamW8bit, 3), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    resumed, whole = train(AdamW8bit, STEPS, state), train(AdamW8bit, STEPS)
    for name, weight in whole["net"].items():
        assert torch.equal(resumed["net"][name], weight), name
    moment = whole["optimizer"]["state"][0]["exp_avg"]
    assert moment["codes"].dtype == torch.uint8
    assert torch.equal(resumed["optimizer"]["state"][0]["exp_avg"]["codes"], moment["codes"])


@torchao
@pytest.mark.usefixtures("_without_compiler")
def test_its_state_holds_plain_tensors_alone():
    state = train(AdamW8bit, 1)["optimizer"]
    assert find_object(state) is None
    moments = [part for of in state["state"].values() for part in of.values()]
    tensors = [t for part in moments for t in (part.values() if isinstance(part, dict) else [part])]
    assert {type(t) for t in tensors if isinstance(t, torch.Tensor)} == {torch.Tensor}


@torchao
@pytest.mark.usefixtures("_without_compiler")
def test_it_trains_as_adamw_does():
    """The change of the weights is within 10 % of AdamW's."""
    start, ours, theirs = (
        torch.cat([w.flatten() for w in train(kind, steps)["net"].values()])
        for kind, steps in ((AdamW, 0), (AdamW8bit, STEPS), (AdamW, STEPS))
    )
    assert (ours - theirs).norm() < 0.1 * (theirs - start).norm()


def test_without_its_package_a_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("train", ["optimizer=adamw8bit"])
        with pytest.raises(UsageError, match=r"^optimizer=adamw8bit .* pip install torchao"):
            check_config(cfg, "train", ["optimizer=adamw8bit"])
