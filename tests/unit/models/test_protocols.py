"""Networks, text encoders and loggers have all members of their protocols."""

import pytest
from pipeline_text import write_sdxl_text
from world import unet

from ldm.models.base import Denoiser, TextEncoder
from ldm.models.text.cached import CachedTextEncoder
from ldm.models.text.labels import LabelTextEncoder, NullTextEncoder
from ldm.models.text.paired import PairedTextEncoder
from ldm.training.loggers.base import RunLogger
from ldm.training.loggers.csv import CsvLog
from ldm.training.loggers.wandb import WandbRun


def members(protocol: type) -> set[str]:
    own = {name for name in vars(protocol) if not name.startswith("_")}
    return own | set(protocol.__annotations__) - {"_abc_impl"}


def test_the_unet_is_a_denoiser(tiny_text):
    assert members(Denoiser) == {"in_channels", "out_channels", "multiple"}
    assert all(hasattr(unet(tiny_text), name) for name in members(Denoiser))


@pytest.mark.parametrize("kind", ["clip", "pair", "labels", "none", "cached"])
def test_all_text_encoders_have_the_same_members(tiny_text, kind, tmp_path):
    labels = LabelTextEncoder(["cat", "dog"])
    encoders = {"clip": tiny_text, "labels": labels, "none": NullTextEncoder()}
    encoders["cached"] = CachedTextEncoder(labels)
    if kind == "pair":
        encoders["pair"] = PairedTextEncoder(str(write_sdxl_text(tmp_path)))
    assert members(TextEncoder) >= {"width", "pooled_width", "max_length", "names", "null"}
    assert all(hasattr(encoders[kind], name) for name in members(TextEncoder))
    assert list(encoders[kind].names) == (["cat", "dog"] if kind in ("labels", "cached") else [])


@pytest.mark.parametrize("kind", [CsvLog, WandbRun])
def test_all_loggers_have_the_same_members(kind):
    assert all(callable(getattr(kind, name)) for name in members(RunLogger))
