"""A transformer in the place of the UNet: trained, widened, sampled, measured, explained."""

import pytest
import torch
from evaluated_runs import SCENES, TINY, Home, measure
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from PIL import Image
from shell import run

import ldm
from ldm.config.composition import CONF_DIR
from ldm.config.export import write_export
from ldm.config.run import build_job
from ldm.training.job import TrainingJob
from ldm.utils.checkpoint_file import find_newest_checkpoint, read_checkpoint
from ldm.utils.errors import UsageError

NET = ["model=dit_nano", "model.width=32", "model.depth=2", "model.heads=4", "model.patch=2"]
FEW = ["trainer.max_steps=3", "trainer.val_check_interval=3", "eval=none", "features=none"]
FEW += ["optimizer.warmup=1", "optimizer.lr=1e-2", "ema_decay=0.5"]


class Transformers(Home):
    """Runs whose network is a small MMDiT."""

    def build(self, name: str, *overrides: str) -> TrainingJob:
        common = [word for word in TINY if not word.startswith("model.")]
        places = [f"text_encoder.path={self.path}/clip", f"data.folder={self.path}/data"]
        given = [*SCENES, *common, *places, *NET, *FEW, f"name={name}", *overrides]
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            cfg = compose("train", overrides=given)
        return build_job(cfg, self.path / "runs" / name)

    def train(self, name: str, *overrides: str) -> TrainingJob:
        job = self.build(name, *overrides)
        job.trainer.fit(job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True)
        return job

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return read_checkpoint(find_newest_checkpoint(self.path / "runs" / name / "checkpoints"))[
            "state_dict"
        ]


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Transformers:
    """A folder with a run, and one of each task that went on from it."""
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Transformers(path)
    home.train("text2img")
    for task in ("inpaint", "superres"):
        home.train(task, f"task={task}", f"init={path}/runs/text2img")
    return home


def paint(home: Transformers, name: str, *overrides: str, **how) -> torch.Tensor:
    pipe = ldm.load(home.path / "runs" / name, *overrides, device="cpu")
    how = {"seeds": [0, 1], "steps": 3, "output_type": "pt", "progress": False} | how
    return pipe("a small red circle", **how)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", ["cfg", "apg", "interval"])
@pytest.mark.parametrize("task", ["text2img", "inpaint", "superres"])
def test_every_task_is_sampled_with_every_guidance(home, task, guidance, sampler):
    how = {}
    if task != "text2img":
        how["image"] = Image.new("RGB", (16, 16), "navy")
    if task == "inpaint":
        how["mask"] = Image.new("L", (16, 16), 255)
    images = paint(home, task, f"sampler={sampler}", f"guidance={guidance}", **how)
    side = 32 if task == "superres" else 16
    assert images.shape == (2, 3, side, side)
    assert images.isfinite().all()
    assert images[0].std() > 0


def test_pictures_of_other_sizes_and_aspects(home):
    assert paint(home, "text2img", size=[12, 20]).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match="multiple"):
        paint(home, "text2img", size=[13, 20])


def test_a_widened_network_began_with_the_weights_of_the_smaller(home):
    job = home.build("wide", "task=inpaint", f"init={home.path}/runs/text2img")
    own, before = job.module.denoiser.state_dict(), home.state("text2img")
    for name, tensor in own.items():
        first = before[f"ema.module.{name}"]
        if name == "conv_in.weight":
            assert torch.equal(tensor[:, : first.shape[1]], first)
            assert not tensor[:, first.shape[1] :].any()
        else:
            assert torch.equal(tensor, first), name


def test_a_resumed_run_is_the_same_to_the_last_bit(home):
    for steps in (1, 3):
        home.train("parts", f"trainer.max_steps={steps}", "optimizer.decay=constant")
    home.train("whole", "optimizer.decay=constant", "model.checkpointing=all")
    parts, whole = home.state("parts"), home.state("whole")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_adapters_are_trained_and_added_from_their_file(home):
    init = f"init={home.path}/runs/text2img"
    home.train("style", init, "lora.rank=2", "lora.targets=attention")
    file = home.path / "runs" / "style" / "lora.safetensors"
    expected = paint(home, "style")
    assert (expected - paint(home, "text2img")).abs().max() > 1e-3
    added = paint(home, "text2img", f"lora=[{file}]")
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-4)


@pytest.mark.slow  # processes
def test_it_is_measured_and_explained(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measure(ckpt=home.path / "runs" / "text2img")["metrics"]
    words = ["prompt=a red circle", "steps=2", "out=why"]
    run("-m", "ldm.explain", f"ckpt={home.path}/runs/text2img", *words, cwd=tmp_path)
    assert list(tmp_path.glob("why*"))


def test_an_export_is_refused_by_name(home, tmp_path):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("export")
    with pytest.raises(UsageError, match=r"model=dit_\* \(its Stable Diffusion 3 pipeline takes"):
        write_export(cfg, str(home.path / "runs" / "text2img"), tmp_path / "out", {})


def test_videos_are_refused_by_name(home):
    with pytest.raises(InstantiationException, match="takes images, not videos: take a UNet"):
        home.build("video", "task=video", "data.frames=2")
