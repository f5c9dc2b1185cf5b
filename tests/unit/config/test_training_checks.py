"""Settings of a training that exclude each other get one line before the slow imports."""

import pytest
from hydra import compose, initialize_config_dir

from ldm.config.search_path import CONF_DIR
from ldm.config.training_checks import check_buckets, check_lora, check_strategy
from ldm.utils.errors import UsageError

REFUSED = {
    "strategy=fsdp compile=default": "strategy=ddp or compile=off",
    "strategy=fsdp optimizer=adamw8bit": "take optimizer=adamw",
    "strategy=fsdp optimizer=muon": "take strategy=ddp or optimizer=adamw",
    "stage=autoencoder compile=default": "stage=autoencoder trains none: leave it out",
    "lora.rank=4": "give init=RUN",
    "lora.rank=4 init=runs/base strategy=fsdp": "take strategy=ddp",
    "lora.targets=all init=runs/base": "add lora.rank=8",
    "lora.alpha=4 lora.rank=null": "add lora.rank=8",
    "compile=reduce-overhead trainer.accumulate_grad_batches=2": "take compile=default",
}
TAKEN = (
    "compile=default trainer.accumulate_grad_batches=2",
    "compile=reduce-overhead strategy=ddp",
    "lora.rank=4 init=runs/base strategy=ddp compile=default",
    "lora.rank=null strategy=fsdp",
    "compile=off strategy=fsdp stage=autoencoder trainer.accumulate_grad_batches=2",
)


@pytest.mark.parametrize("words", [*REFUSED, *TAKEN])
def test_what_does_not_go_together_is_refused(words):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=["name=x", *words.split()])
    if words in TAKEN:
        check_strategy(cfg)
        check_lora(cfg)
    else:
        with pytest.raises(UsageError, match=REFUSED[words]):  # noqa: PT012
            check_strategy(cfg)
            check_lora(cfg)


MISFITS = {
    "data.pixels=64*64": "is the area of data.buckets=auto: add that",
    "data.pixels=64*64 data.buckets=[[80,48]]": "is the area of data.buckets=auto: add that",
    "data.pixels=many data.buckets=auto": "data.pixels=many is no area of images",
    "data.buckets=[[80,48],[48,70]]": r"has \[48,70\]: 70 is no multiple of 16, which the networks",
    **{
        f"data.buckets={wrong}": r"must be auto, or sizes such as \[\[768,512\],\[512,768\]\]"
        for wrong in ("64", "foo", "[]", "[64,48]", "[[64]]", "[[64,a]]", "[[64,0]]", "[[64,48.5]]")
    },
    "data.buckets=[[80,48],[80,48]]": "one of the sizes is there twice",
    "data.buckets=auto data.frames=4": "are of images: leave data.frames out",
    "data.buckets=auto stage=clip": "stage=clip takes images of one size",
    "data.buckets=auto stage=classifier": "stage=classifier takes images of one size",
    "data.buckets=auto style_encoder=clip": "a style image is a square: leave either out",
    "data.buckets=auto compile=reduce-overhead": "is of one size: take compile=default",
}
FITTING = (
    "data.size=96",
    "data.buckets=auto data.pixels=512*512",
    "data.buckets=auto compile=default",
    "data.buckets=[[80,48],[48,80]]",
    "data.buckets=[[80,48],[48,80]] stage=autoencoder",
)


@pytest.mark.parametrize("words", [*MISFITS, *FITTING])
def test_what_does_not_go_together_with_buckets_is_refused(words):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose(
            "train", ["name=x", "data=shards", "data.train=x", "data.val=x", *words.split()]
        )
    if words in FITTING:
        check_buckets(cfg)
    else:
        with pytest.raises(ValueError, match=MISFITS[words]):
            check_buckets(cfg)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("data.buckets=null", 64),
        ("data.buckets=auto data.size=96", 96),
        ("data.buckets=auto data.pixels=512*512", 512),
        ("data.buckets=[[768,512],[512,768]]", 640),
    ],
)
def test_the_usual_size_is_the_square_of_the_area(words, size):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        assert compose("train", ["data=coco", *words.split()]).data.size == size
