"""Checkpoints that are whole and open, and hold something else than ours do: one sentence each."""

import io
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.config import command_line
from ldm.config.command_line import convert_to_usage_errors
from ldm.config.components import build_denoiser, build_frozen_encoders
from ldm.config.pipeline import load_pipeline
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.utils.checkpoint_file import manifest_path
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_file, hash_module

OVERRIDES = ["name=x", "autoencoder=identity", "text_encoder=none", "model.channels=8"]
OVERRIDES += ["model.groups=4", "model.embedding=16", "model.positional_waves=0", "model.heads=2"]
OVERRIDES += ["model.multipliers=[1]", "model.attention=[false]", "data.size=16"]


@pytest.fixture(scope="module")
def sampling():
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        return OmegaConf.create(OmegaConf.to_container(compose("sample"), resolve=True))


@pytest.fixture(scope="module")
def honest() -> dict:
    """The payload of an untrained run of the smallest size."""
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=OVERRIDES)
    encoder, text = build_frozen_encoders(cfg)
    net = build_denoiser(cfg, encoder, text, None, TextToImage())
    digests = {"autoencoder": hash_module(encoder), "text_encoder": hash_module(text)}
    config = OmegaConf.to_container(cfg, resolve=True)
    weights = net.state_dict().items()
    state = {f"{at}.{name}": t for at in ("denoiser", "ema.module") for name, t in weights}
    facts = {"stage": "diffusion", "config": config, "frozen": digests}
    return {"state_dict": state, "global_step": 1, "ldm": facts}


GONE = object()
TYPES = (None, 5, "text", [], {}, True, float("nan"), 10**30, b"bytes", torch.zeros(2))
ENTRIES = ("state_dict", "global_step", "ldm", "ldm.stage", "ldm.config", "ldm.frozen")
ENTRIES += ("ldm.frozen.autoencoder", "ldm.frozen.text_encoder")
ODD = [(entry, value) for entry in ENTRIES for value in (GONE, *TYPES)]
CONFIG = ("model", "model.channels", "model.multipliers", "model.heads", "scheduler.steps", "task")
CONFIG += ("objective.prediction", "objective.prediction.kind", "timestep_sampler.power", "data")
CONFIG += ("data.size", "data.batch_size", "data.frames", "trainer", "trainer.precision")
CONFIG += ("autoencoder", "autoencoder.patch", "text_encoder", "weighting", "style_encoder")
VALUES = (GONE, None, 5, -1, 0, "text", [], ["a"], {}, True, float("nan"), float("inf"), 10**30)
ODD += [(f"ldm.config.{entry}", value) for entry in CONFIG for value in VALUES]
TENSORS = {
    "another shape": torch.zeros(3, 3),
    "a scalar": torch.zeros(()),
    "a huge view": torch.zeros(1).expand(2**40),
    "whole numbers": torch.zeros(8, dtype=torch.int64),
    "complex": torch.zeros(8, dtype=torch.complex64),
    "sparse": torch.eye(8).to_sparse(),
    "no values": torch.zeros(8, device="meta"),
    "a number": 5,
    "nothing": None,
}


def with_value(payload: dict, entry: str, value: object) -> dict:
    """The payload with another value at a place, or none there."""
    *above, leaf = entry.split(".")
    payload = {**payload, "ldm": deepcopy(payload["ldm"])}
    node = payload
    for key in above:
        node = node[key]
    if value is GONE:
        del node[leaf]
    else:
        node[leaf] = value
    return payload


def restored(payload: object, place: Path, sampling) -> str | None:
    """What is said of a run with this payload; None where it is sampled from."""
    if isinstance(payload, dict) and isinstance(payload.get("ldm"), dict):
        facts = payload["ldm"]
        if isinstance(facts.get("config"), dict):
            payload["ldm"] = facts | {"config": yaml.safe_dump(facts["config"])}
    path = place / "step=00000001.ckpt"
    file = io.BytesIO()
    torch.save(payload, file)
    path.write_bytes(file.getvalue())
    manifest = {"size": path.stat().st_size, "sha256": hash_file(path)}
    manifest_path(path).write_text(json.dumps(manifest))
    try:
        with convert_to_usage_errors():
            load_pipeline(sampling, str(path), {})
    except UsageError as error:
        return str(error)
    return None


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_honest_one_is_restored(honest, place, sampling):
    assert restored(with_value(honest, "global_step", 2), place, sampling) is None


def sentence(said: str | None) -> bool:
    return said is None or ("\n" not in said.strip() and len(said) < 600)


@pytest.mark.parametrize("entry", dict(ODD))
def test_an_odd_entry_is_told_in_a_sentence(entry, honest, place, sampling):
    """Whatever the value, no other error than a UsageError comes out."""
    for odd, value in ODD:
        if odd == entry:
            said = restored(with_value(honest, odd, value), place, sampling)
            assert sentence(said), (odd, value)
            if entry in ENTRIES:
                assert said is not None or (entry, value) == ("global_step", 5), (odd, value)
                assert said is None or str(place) in said, said


@pytest.mark.parametrize("payload", [[], None, 5, "x", {}, torch.zeros(1)], ids=repr)
def test_a_file_of_something_else_is_told(payload, place, sampling):
    assert "Take the file that train.py wrote" in restored(payload, place, sampling)


@pytest.mark.parametrize("case", TENSORS)
def test_an_odd_tensor_is_told(case, honest, place, sampling):
    name = "ema.module.conv_in.bias"
    state = honest["state_dict"] | {name: TENSORS[case]}
    said = restored(with_value(honest, "state_dict", state), place, sampling)
    assert said is not None
    assert "conv_in.bias" in said
    assert sentence(said)


def test_odd_names_of_tensors_are_told(honest, place, sampling):
    for name in (5, None, "ema.module.conv_in.bias\x1b[31m"):
        state = honest["state_dict"] | {name: torch.zeros(8)}
        said = restored(with_value(honest, "state_dict", state), place, sampling)
        assert sentence(said)
        assert said is not None
        assert "\x1b" not in said
