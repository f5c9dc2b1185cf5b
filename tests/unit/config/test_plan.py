"""plan=true: what a run takes, against the parts that a run builds."""

from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ldm.config.components import build_components
from ldm.config.counted_parts import (
    PUBLISHED_TEXT_CONFIGS,
    count_clip,
    count_parameters,
    count_t5,
    count_text_encoder,
)
from ldm.config.plan import count_plan
from ldm.config.python_api import compose
from ldm.config.reserved_settings import ADAMW_8BIT_TARGET
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.training.muon import find_matrices
from ldm.utils.errors import UsageError

SMALL_CLIP = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 9,
}
SMALL_T5 = {"vocab_size": 100, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2}
SMALL_T5 |= {"num_heads": 3, "feed_forward_proj": "gated-gelu"}
SMALL = ("model.channels=16", "model.heads=2", "data.batch_size=4")


@cache
def plan(*words: str) -> dict:
    return count_plan(compose("train", [*SMALL, *words]))


@pytest.mark.parametrize("name", [name for name in PUBLISHED_TEXT_CONFIGS if "t5" not in name])
def test_a_published_clip_has_the_parameters_of_transformers(name):
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**PUBLISHED_TEXT_CONFIGS[name]))
    assert count_clip(name).parameters == count_parameters(model)


def test_a_published_t5_has_the_parameters_of_transformers():
    config = PUBLISHED_TEXT_CONFIGS["google/flan-t5-base"]
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    assert count_t5(config, 128, pooled=True).parameters == count_parameters(model)


def count_real_flops(model, length: int) -> int:
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids)
    return counter.get_total_flops()


def test_flops_of_text_encoders_are_those_of_a_caption(tmp_path):
    clip = CLIPTextModel(CLIPTextConfig(num_attention_heads=2, **SMALL_CLIP))
    clip.config.save_pretrained(tmp_path)
    assert count_clip(str(tmp_path)).flops == count_real_flops(clip, 9)
    t5 = T5EncoderModel(T5Config(**SMALL_T5))
    assert count_t5(SMALL_T5, 9, pooled=False).flops == count_real_flops(t5, 9)


def test_the_packaged_text_encoder_is_counted_well():
    cfg = compose("train")
    sizes, real = count_text_encoder(cfg.text_encoder), instantiate(cfg.text_encoder)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real(["a red circle"])
    assert sizes.parameters == count_parameters(real)
    assert sizes.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_parts_are_those_of_the_run():
    cfg = compose("train", SMALL)
    built, table = build_components(cfg, TextToImage()), plan()
    parts = {"denoiser": built.denoiser, "autoencoder": built.autoencoder}
    parts["text encoder"] = built.text_encoder
    counted = table["parameters"]
    assert counted["trained"] == counted["denoiser"]
    assert {name: count_parameters(part) for name, part in parts.items()}.items() <= counted.items()
    assert table["run"]["training images"] == cfg.data.count
    weights = 4 * counted["denoiser"]
    memory = table["bytes of memory on a device"]
    assert memory["weights"] == memory["gradients"] == memory["EMA"] == weights
    assert memory["optimizer"] == 2 * weights
    assert memory["peak"] > 5 * weights + memory["activations"] / 2


@pytest.mark.parametrize("words", [["trainer.devices=2"], ["trainer.accumulate_grad_batches=2"]])
def test_a_step_has_the_same_flops_however_it_is_split(words):
    whole, split = plan(), plan(*words)
    assert split["FLOPs of a step"] == whole["FLOPs of a step"]
    memory = "bytes of memory on a device"
    assert split[memory]["activations"] < 0.6 * whole[memory]["activations"]


def test_shards_of_fsdp_moments_of_8_bits_and_muon_take_less():
    memory = "bytes of memory on a device"
    whole, shards = plan("trainer.devices=4"), plan("trainer.devices=4", "strategy=fsdp")
    for name in ("weights", "gradients", "optimizer", "EMA"):
        assert shards[memory][name] == pytest.approx(whole[memory][name] / 4, abs=1)
    cfg = compose("train", SMALL)
    cfg.optimizer._target_ = ADAMW_8BIT_TARGET  # its package need not be installed
    eight = count_plan(cfg)[memory]["optimizer"]
    assert eight < 0.4 * whole[memory]["optimizer"]
    muon = plan("optimizer=muon")
    denoiser = build_components(compose("train", SMALL), TextToImage()).denoiser
    saved = 4 * sum(weight.numel() for weight in find_matrices(denoiser))
    assert saved > whole[memory]["optimizer"] / 4
    assert muon[memory]["optimizer"] == whole[memory]["optimizer"] - saved
    disk = "bytes on disk"
    assert muon[disk]["a checkpoint"] == whole[disk]["a checkpoint"] - saved


def test_a_training_from_a_cache_runs_no_encoders():
    words = ["data=cached", "data.train=none", "data.val=none"]
    table = plan(*words, "data.size=64")
    flops = table["FLOPs of a step"]
    assert flops["autoencoder"] == flops["text encoder"] == 0
    assert flops["denoiser forward"] == plan()["FLOPs of a step"]["denoiser forward"]
    with pytest.raises(UsageError, match=r"give data\.size=256"):
        plan(*words)


def test_adapters_alone_are_trained():
    counted = plan("lora.rank=2", "init=none")["parameters"]
    assert 0 < counted["trained"] < counted["denoiser"] / 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=clip"], "stage=clip has none"),
        (["style_encoder=clip"], "plan counts no style encoder"),
        (["text_encoder=t5", "text_encoder.path=me/mine"], "does not know its sizes"),
        (["data.size=60"], "must be a multiple of"),
    ],
)
def test_what_cannot_be_counted_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        plan(*words)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.train=[{path: a, weight: 0}]", "a: the weight is a number above 0, got 0"),
        ("data.buckets=[[64,60]]", "60 is no multiple of"),
        ("data.pixels=512*512", "is the area of data.buckets=auto: add that"),
    ],
)
def test_a_plan_refuses_the_settings_of_data_that_a_run_refuses(word, told):
    with pytest.raises(UsageError, match=told):
        plan("data=shards", "data.train=a", "data.val=a", word)
