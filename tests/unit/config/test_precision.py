"""trainer.precision=auto: what a machine gets, and what a resumed run keeps."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.components import choose_precision
from ldm.config.train_run import keep_former_precision


def test_a_cpu_trains_in_float32():
    assert choose_precision("cpu") == "32-true"


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16_where_it_can():
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert choose_precision("auto") == ("bf16-mixed" if has_bfloat16 else "32-true")


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ("trainer: {precision: 32-true}", "auto", "32-true"),
        ("trainer: {precision: bf16-mixed}", "auto", "bf16-mixed"),
        ("trainer: {precision: 32-true}", "bf16-mixed", "bf16-mixed"),
        ("trainer: {max_steps: 3}", "auto", "32-true"),
        (None, "auto", "auto"),
    ],
    ids=["float32", "bfloat16", "the user's word", "older than the setting", "new"],
)
def test_a_resumed_run_keeps_its_precision(settings, given, expected, tmp_path):
    if settings:
        (tmp_path / "config.yaml").write_text(settings)
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/step=00000001.ckpt").touch()
    cfg = OmegaConf.create({"trainer": {"precision": given}})
    keep_former_precision(cfg, tmp_path)
    assert cfg.trainer.precision == expected
