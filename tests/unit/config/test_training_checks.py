"""Settings of a training that exclude each other get one line before the slow imports."""

import pytest
from hydra import compose, initialize_config_dir

from ldm.config.search_path import CONF_DIR
from ldm.config.training_checks import check_lora, check_strategy
from ldm.utils.errors import UsageError

REFUSED = {
    "strategy=fsdp compile=default": "strategy=ddp or compile=off",
    "strategy=fsdp optimizer=adamw8bit": "take optimizer=adamw",
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
