"""What of a run's time is training, waiting for data, and looking at what came of it."""

import time

import lightning as L
import pytest
import torch
from PIL import Image
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.monitoring import (
    ProgressBar,
    SampleImages,
    ThroughputMonitor,
    seed_default_generators,
)
from ldm.training.loggers.csv import CsvLog

SLOW = 0.5  # seconds that pictures take
STEPS = 5  # with a validation after the second, the fourth and the last

pytestmark = pytest.mark.filterwarnings("ignore:.*srun", "ignore:The number of training batches")


class Seconds(L.Callback):
    """How long a call has trained."""

    def on_train_start(self, *args) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *args) -> None:
        self.all = time.perf_counter() - self.began


def draw() -> tuple[Image.Image, dict]:
    time.sleep(SLOW)
    return Image.new("RGB", (8, 8)), {}


@pytest.fixture(scope="module")
def told(shapes, tiny_text, tmp_path_factory) -> tuple[list[dict], float, ThroughputMonitor]:
    """What was logged, how many seconds it took in all, and the meter."""
    folder, seconds, said = tmp_path_factory.mktemp("run"), Seconds(), []
    trainer = make_trainer(
        steps=STEPS, callbacks=[SampleImages(folder, draw), seconds], validate_every=2
    )
    log = CsvLog(folder / "metrics.csv")
    trainer.loggers = [log]
    log.log_metrics = lambda metrics, step=None: said.append({"at": step, **metrics})
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    return said, seconds.all, trainer.callbacks[0]


def test_time_for_sample_images_does_not_count_as_data_wait(told):
    trained = [row for row in told[0] if "perf/data_wait" in row]
    assert [row["at"] for row in trained] == [1, 2, 3, 4, 5]
    for row in trained:
        assert row["perf/data_wait"] < 0.5, row


def test_eval_share_is_the_time_of_validations_and_sample_images(told):
    said, seconds, meter = told
    evaluated = [row["perf/eval_share"] for row in said if "perf/data_wait" in row]
    assert evaluated[:2] == [0, 0], "nothing was validated yet"
    assert 0 < evaluated[3] < evaluated[2] < 1, "training lowers it again"
    *_, last = said
    assert last.keys() == {"at", "perf/eval_share"}
    assert last["at"] == STEPS
    # The last validation counts, too, and its pictures.
    assert 3 * SLOW / seconds <= last["perf/eval_share"] + 0.02
    assert last["perf/eval_share"] < 1
    assert meter.latest["perf/eval_share"] == last["perf/eval_share"]
    assert meter.latest["train/loss"] > 0


def test_speed_is_of_the_training(told):
    """Images a second, times the seconds that were trained, are the images."""
    said, seconds, meter = told
    spent = sum(4 / row["perf/images_per_s"] for row in said if "perf/images_per_s" in row)
    assert spent == pytest.approx(seconds * (1 - meter.latest["perf/eval_share"]), rel=0.35)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_bar_counts_batches_to_the_last_of_the_last_step(shapes, tiny_text, accumulate):
    trainer = make_trainer(steps=3, accumulate=accumulate)
    bar = ProgressBar(trainer.callbacks[0])
    trainer.callbacks.append(bar)
    trainer.fit(latent_diffusion(tiny_text), datamodule=shapes_data(shapes))
    assert bar.train_progress_bar.total == 3 * accumulate
    assert bar.train_progress_bar.n == 3 * accumulate


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_bar_of_a_resumed_run_goes_on(shapes, tiny_text, accumulate, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
            if trainer.global_step == 3 and not (tmp_path / "a.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    for ckpt_path in (None, tmp_path / "a.ckpt"):
        trainer = make_trainer(steps=5, accumulate=accumulate, callbacks=[Save()])
        bar = ProgressBar(trainer.callbacks[0])
        trainer.callbacks.append(bar)
        model, data = latent_diffusion(tiny_text), shapes_data(shapes)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    assert bar.train_progress_bar.total == 5 * accumulate
    assert bar.train_progress_bar.n == 5 * accumulate
    assert bar.train_progress_bar.initial == 3 * accumulate


def test_the_default_generators_get_the_seed_that_manual_seed_gives():
    seed_default_generators(torch.device("cpu"), 2**62 + 1)
    drawn = torch.rand(3)
    torch.manual_seed(2**62 + 1)
    assert torch.equal(drawn, torch.rand(3))
