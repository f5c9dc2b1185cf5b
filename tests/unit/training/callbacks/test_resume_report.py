"""A resumed run with more steps says what becomes of the learning rate."""

import pytest
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.resume_report import ResumeReport
from ldm.training.optimizers import AdamW


@pytest.mark.parametrize(
    ("decay", "said"),
    [
        ("cosine", "4 was 0, is 0.000827; optimizer.decay=cosine now falls to 0 at step 12"),
        ("constant", "4 stays 0.001"),
    ],
)
def test_a_raised_max_steps_says_what_becomes_of_the_learning_rate(
    tmp_path, shapes, tiny_text, capsys, decay, said
):
    def fit(steps, resume=None):
        module = latent_diffusion(tiny_text)
        module.make_optimizer = AdamW(lr=1e-3, warmup=1, decay=decay)
        config = f"trainer: {{max_steps: {steps}}}\noptimizer: {{decay: {decay}}}\n"
        keeper = Checkpoints(tmp_path, every=4, keep=9, facts={"config": config})
        trainer = make_trainer(steps=steps, callbacks=[keeper, ResumeReport()])
        trainer.fit(module, datamodule=shapes_data(shapes), ckpt_path=resume, weights_only=True)
        return capsys.readouterr().out

    assert "learning rate" not in fit(4)
    last = tmp_path / "step=00000004_end.ckpt"
    assert f"trainer.max_steps was 4, is 12: the learning rate at step {said}\n" in fit(12, last)
    assert "learning rate" not in fit(12, tmp_path / "step=00000008.ckpt")
