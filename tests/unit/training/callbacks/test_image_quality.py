"""Metrics of painted pictures inside a run: when, of what, and through interruptions."""

import csv
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import balls
import lightning as L
import pytest
import torch
from torch import Tensor
from world import SIZE, components, latent_diffusion, make_trainer

from ldm.data.datamodule import TextImageData
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.evaluation.features.clip import ClipFeatures
from ldm.inference.pipeline import Pipeline
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.early_stop import patience_stopping
from ldm.training.callbacks.evaluation import ImageQuality
from ldm.training.callbacks.preemption import PreemptionHandler
from ldm.training.fsdp import FullyShardedStrategy
from ldm.training.loggers.csv import CsvLog
from ldm.utils.checkpoint_file import delete_checkpoint, find_newest_checkpoint

COUNT, BATCH = 10, 4  # pictures in three pieces
METRICS = ("fd_clip", "kid", "precision", "recall", "density", "coverage", "cmmd")
SCORES = ("clip_score", "clip_score_chance")
CONSTANTS = ("fd_clip_floor", "clip_score_real")
pytestmark = pytest.mark.filterwarnings(
    "ignore:a caption of .* is cut", "ignore:.*srun", "ignore:The number of training batches"
)


class Canvas(IdentityAutoencoder):
    """Pixels as latents; it counts the pictures, and a signal comes with one of them."""

    def __init__(self, signal_at: int | None = None) -> None:
        super().__init__()
        self.painted, self.signal_at = 0, signal_at

    def decode(self, latents: Tensor) -> Tensor:
        before, self.painted = self.painted, self.painted + len(latents)
        if self.signal_at is not None and before <= self.signal_at < self.painted:
            signal.raise_signal(signal.SIGTERM)
        return super().decode(latents)


@dataclass
class Home:
    """Pictures, a CLIP, and runs."""

    path: Path
    text: object

    def data(self) -> TextImageData:
        train, val = str(self.path / "train"), str(self.path / "val")
        return TextImageData(train=train, val=val, size=SIZE, batch_size=4, workers=0, val_limit=2)

    def run(self, name: str, **more) -> "Run":
        """Train as `train.py` does, from the newest checkpoint, or begin with a validation."""
        run = Run(self, self.path / "runs" / name, **more)
        run.go()
        return run

    def metrics(self, name: str) -> dict[int, dict[str, str]]:
        """metrics.csv by step, without what a clock says and what training says."""
        with (self.path / "runs" / name / "metrics.csv").open() as file:
            rows = {int(row["step"]): row for row in csv.DictReader(file)}
        return {
            step: {k: v for k, v in row.items() if k.startswith("val/") and v}
            for step, row in rows.items()
        }


@dataclass
class Run:
    """One call of a run's command."""

    home: Home
    folder: Path
    steps: int = 4
    lr: float = 1e-3
    signal_at: int | None = None
    raw: bool = False
    check: bool = True
    accumulate: int = 1
    every: int = 10**6
    options: dict = field(default_factory=dict)
    watch: list[L.Callback] = field(default_factory=list)
    left: int | None = None  # the exit code of a call that was ended

    def go(self) -> None:
        data, self.canvas = self.home.data(), Canvas(self.signal_at)
        self.module = latent_diffusion(self.home.text, lr=self.lr)
        keeper = Checkpoints(self.folder / "checkpoints", every=self.every, keep=2, facts={})
        callbacks = [keeper, PreemptionHandler(keeper.save_now, every=1), *self.watch]
        if self.check:
            callbacks.insert(0, self.image_check(data))
        self.trainer = make_trainer(
            steps=self.steps, callbacks=callbacks, validate_every=2, accumulate=self.accumulate
        )
        self.trainer.loggers = [CsvLog(self.folder / "metrics.csv")]
        begun = find_newest_checkpoint(self.folder / "checkpoints")
        how = {"datamodule": data}
        try:
            if begun is None:
                self.trainer.validate(self.module, **how, verbose=False)
            self.trainer.fit(self.module, **how, ckpt_path=begun, weights_only=True)
        except SystemExit as end:
            self.left = end.code

    def image_check(self, data: TextImageData) -> ImageQuality:
        pipeline = Pipeline(
            components(self.home.text, denoiser=self.module.ema.module, autoencoder=self.canvas),
            sampler=DDIMSampler(),
            guidance=ClassifierFreeGuidance(scale=2.0),
        )
        options = {"count": COUNT, "steps": 1, "every": 0, "real": 100, "batch": BATCH}
        return ImageQuality(
            pipeline,
            [ClipFeatures(str(self.home.path / "clip"))],
            images=data.val_set,
            reference_images=data.train_set.without_augmentation(),
            size=SIZE,
            folder=self.folder / "eval",
            settings="all as ever",
            raw_denoiser=self.module.denoiser,
            raw=self.raw,
            cache=str(self.home.path / "cache"),
            **options | self.options,
        )


@pytest.fixture(autouse=True)
def handlers():
    """Signals as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_clip, tiny_text) -> Home:
    path = tmp_path_factory.mktemp("home")
    balls.write(path / "train", range(24))
    balls.write(path / "val", range(100, 116))
    tiny_clip.save(path / "clip")
    return Home(path, tiny_text)


@pytest.fixture(scope="module")
def whole(home) -> Run:
    """Four steps with a validation before them, after the second and at the end."""
    return home.run("whole")


def test_a_run_measures_before_between_and_at_its_end(home, whole):
    metrics = home.metrics("whole")
    assert {step for step, row in metrics.items() if row} == {0, 2, 4}
    for step in (0, 2, 4):
        found = {name.removeprefix("val/") for name in metrics[step] if "loss" not in name}
        assert found == {*METRICS, *SCORES, *CONSTANTS}
    assert whole.canvas.painted == 3 * COUNT
    for name in CONSTANTS:
        assert len({metrics[step][f"val/{name}"] for step in (0, 2, 4)}) == 1
    assert metrics[0]["val/fd_clip"] != metrics[2]["val/fd_clip"] != metrics[4]["val/fd_clip"]
    assert float(whole.trainer.callback_metrics["val/fd_clip"]) == pytest.approx(
        float(metrics[4]["val/fd_clip"])
    )


def test_only_the_subset_file_remains(whole):
    subset = whole.trainer.callbacks[1].quality.subset
    names = [path.name for path in (whole.folder / "eval").iterdir()]
    assert names == [f"subset-{subset.digest}.json"]


def test_an_evaluation_does_not_change_the_training(home, whole):
    plain = home.run("plain", check=False)
    assert not any("fd" in name for name in home.metrics("plain")[4])
    state = plain.module.state_dict()
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_raw_weights_are_measured_as_well_as_their_average(home, whole):
    run = home.run("raw", raw=True)
    metrics = home.metrics("raw")
    assert run.canvas.painted == 5 * COUNT, "before the first step both are the same"
    for step, row in home.metrics("whole").items():
        assert {name: metrics[step][name] for name in row} == row
    raw = {name.removesuffix("_raw") for name in metrics[0] if name.endswith("_raw")}
    assert raw == {f"val/{name}" for name in (*METRICS, *SCORES)}, "nothing twice"
    assert metrics[0]["val/fd_clip_raw"] == metrics[0]["val/fd_clip"]
    assert metrics[4]["val/fd_clip_raw"] != metrics[4]["val/fd_clip"]


# The picture in which the signal comes: in the second piece before the first step, at the
# validation in the middle, and at the last one; in the last piece of the last one.
@pytest.mark.parametrize("at", [5, COUNT + 5, 2 * COUNT + 5, 3 * COUNT - 1])
def test_a_run_that_ends_during_an_evaluation_continues_it(home, whole, at):
    name = f"ended-{at}"
    first = home.run(name, signal_at=at)
    assert first.left == 75
    assert at < first.canvas.painted <= at + BATCH, "it leaves after the piece"
    assert [path for path in (first.folder / "eval").glob("step=*") if path.is_dir()]
    second = home.run(name)
    assert second.left is None
    assert first.canvas.painted + second.canvas.painted == 3 * COUNT, "none was painted twice"
    assert home.metrics(name) == home.metrics("whole")
    assert sorted(path.name for path in second.folder.glob("checkpoints/*_end.ckpt"))
    assert not list((first.folder / "eval").glob("step=*"))
    assert float(second.trainer.callback_metrics["val/fd_clip"]) == float(
        whole.trainer.callback_metrics["val/fd_clip"]
    )
    state = second.module.state_dict()
    for part, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, state[part]), part


def test_an_evaluation_may_be_interrupted_many_times(home, whole):
    """With accumulation, twice in one validation that is owed, and in the raw weights' half."""
    first = home.run("again", accumulate=2, raw=True, signal_at=2 * COUNT + 1)
    second = home.run("again", accumulate=2, raw=True, signal_at=1)
    third = home.run("again", accumulate=2, raw=True, signal_at=COUNT - BATCH)
    fourth = home.run("again", accumulate=2, raw=True)
    calls = (first, second, third, fourth)
    assert [call.left for call in calls] == [75, 75, 75, None]
    assert sum(call.canvas.painted for call in calls) == 5 * COUNT
    undisturbed = home.run("undisturbed", accumulate=2, raw=True)
    assert undisturbed.left is None
    assert home.metrics("again") == home.metrics("undisturbed")


def test_features_of_other_weights_are_not_used(home):
    """A step may be come to again with others: the run was taken up before it, or begun anew."""
    first = home.run("other", signal_at=COUNT + 5, lr=1e-2)
    assert first.left == 75
    for path in (first.folder / "checkpoints").iterdir():
        path.unlink()
    second = home.run("other", lr=1e-3)
    assert second.canvas.painted == 3 * COUNT
    assert home.metrics("other")[2] == home.metrics("whole")[2]
    assert not list((first.folder / "eval").glob("step=*"))


def test_a_last_step_without_a_validation_gets_one(home):
    """A run that is to end earlier than it was to: step 5 was saved on the way."""
    first = home.run("lowered", steps=6, every=1, signal_at=3 * COUNT + 5)
    assert first.left == 75
    delete_checkpoint(first.folder / "checkpoints" / "step=00000006.ckpt")
    again = home.run("lowered", steps=5)
    assert again.left is None
    assert again.canvas.painted == COUNT
    assert {step for step, row in home.metrics("lowered").items() if row} == {0, 2, 4, 5}
    assert find_newest_checkpoint(again.folder / "checkpoints").name == "step=00000005_end.ckpt"
    assert again.trainer.global_step == again.trainer.max_steps == 5


class Known(L.Callback):
    """At each validation's end, whether there is a value of a metric."""

    def __init__(self) -> None:
        self.at: dict[int, bool] = {}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.at[trainer.global_step] = "val/fd_clip" in trainer.callback_metrics


def test_metrics_of_an_earlier_validation_are_dropped(home):
    """Neither is the best checkpoint chosen by an old one, nor patience lost on it."""
    known = Known()
    watch = [
        known,
        patience_stopping(
            metric="val/fd_clip", direction="minimize", validations=1, min_delta=-1e9
        ),
    ]
    # 8, 16, 24, 32 and 40 images: 16 and 32 are multiples, and the last one is measured always.
    run = home.run("rarely", steps=10, options={"every": 16}, watch=watch)
    assert known.at == {0: True, 2: False, 4: True, 6: False, 8: True, 10: True}
    assert run.trainer.global_step == 10
    assert [bool(row.get("val/fd_clip")) for row in home.metrics("rarely").values() if row] == [
        *(True, False, True, False, True, True)
    ]


def due(every: int, *, interval: int, accumulate: int = 1, batch: int = 8, last: int = 40):
    """The steps at which it is due, of those at which there is a validation."""
    check = ImageQuality.__new__(ImageQuality)
    check.every = every
    steps = [*range(0, last, interval), last]
    trainer = SimpleNamespace(
        max_steps=last,
        val_check_interval=interval * accumulate,
        accumulate_grad_batches=accumulate,
        datamodule=SimpleNamespace(batch_size=batch),
    )
    return [s for s in steps if check.is_due(SimpleNamespace(**vars(trainer), global_step=s))]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_due_after_so_many_images(accumulate):
    more = {"accumulate": accumulate}
    assert due(0, interval=10, **more) == [0, 10, 20, 30, 40]
    assert due(1, interval=10, **more) == [0, 10, 20, 30, 40]
    assert due(80, interval=10, **more) == [0, 10, 20, 30, 40]
    assert due(160, interval=10, **more) == [0, 20, 40]
    assert due(100, interval=10, **more) == [0, 20, 30, 40]  # passed 100, 200, 300
    assert due(120, interval=5, **more) == [0, 15, 30, 40]
    assert due(10**9, interval=10, **more) == [0, 40]


def test_invalid_settings_are_refused(home):
    with pytest.raises(ValueError, match="0 or more, got -1"):
        home.run("wrong", options={"every": -1})
    check = ImageQuality.__new__(ImageQuality)
    check.pipelines = {"": None, "_raw": None}
    trainer = SimpleNamespace(strategy=FullyShardedStrategy())
    with pytest.raises(ValueError, match=r"fsdp .* take eval.images.raw=false"):
        check.setup(trainer, L.LightningModule(), "fit")
