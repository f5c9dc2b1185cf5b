"""Folders of published models: what they hold, and the pictures that diffusers paints with them."""

import json
import shutil
from pathlib import Path

import published_folders as folders
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

import ldm
from ldm.config.published import is_foreign_pipeline, is_published, open_published
from ldm.config.training_images import open_run_images
from ldm.diffusion.tasks.inpainting import Inpainting
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module

WRITERS = {
    "sd1": folders.write_sd1,
    "sd2": folders.write_sd2,
    "sdxl": folders.write_sdxl,
    "inpainting": folders.write_inpainting,
}
SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False, **folders.GRID),
    "ddim_last_alpha": DDIMScheduler(clip_sample=False, steps_offset=1, **folders.BETAS),
    "ddim_trailing": DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **folders.BETAS),
    "euler": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **folders.BETAS),
    "dpmpp_2m": DPMSolverMultistepScheduler(
        timestep_spacing="leading", steps_offset=1, **folders.BETAS
    ),
    "pndm": PNDMScheduler(skip_prk_steps=True, **folders.GRID),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of each kind, by name; they are not changed."""
    home = tmp_path_factory.mktemp("published")
    return {name: write(home / name) for name, write in WRITERS.items()}


@pytest.fixture
def sd1(written, tmp_path):
    """A copy of a folder, to change."""
    return shutil.copytree(written["sd1"], tmp_path / "sd1")


def paint_with_diffusers(folder, *, negative=None, scheduler=None):
    """Two pictures (2, 3, H, W) in [-1, 1], from the seeds 3 and 4."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a red circle", "a blue square"],
        negative_prompt=None if negative is None else [negative] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=10,
        guidance_scale=5.0,
        height=folders.SIDE,
        width=folders.SIDE,
        output_type="pt",
    ).images
    return 2 * images - 1


def paint(folder, *words, negative=""):
    """The same two pictures by our networks."""
    pipe = ldm.load(folder, "guidance.scale=5", *words)
    how = {"steps": 10, "negative": negative, "output_type": "pt", "progress": False}
    parts = zip(["a red circle", "a blue square"], (3, 4), strict=True)
    return torch.cat([pipe(prompt, seeds=seed, **how) for prompt, seed in parts])


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("negative", [None, "a green star"])
def test_a_seed_gives_the_picture_that_diffusers_gives(written, name, negative):
    theirs = paint_with_diffusers(written[name], negative=negative)
    ours = paint(written[name], negative=negative or "")
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_of_published_pipelines_are_met(sd1, name):
    SCHEDULERS[name].save_pretrained(sd1 / "scheduler")
    change_index(sd1, scheduler=["diffusers", type(SCHEDULERS[name]).__name__])
    theirs = paint_with_diffusers(sd1, scheduler=SCHEDULERS[name])
    assert (paint(sd1) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("grid", "spacing"), [("euler", "linspace"), ("dpm", "karras")])
def test_a_guide_gets_the_timesteps_of_the_grid_as_the_network_does(written, grid, spacing):
    words = ["sampler=ddim", f"sampler.grid={grid}", f"sampler.spacing={spacing}"]
    ours = paint(written["sd1"], *words, "guidance.scale=1")
    itself = ["guidance=autoguidance", f"guidance.guide={written['sd1']}"]
    assert (paint(written["sd1"], *words, *itself) - ours).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_shift_of_the_latents_is_read_as_the_pipeline_reads_it(written, tmp_path, name):
    folder = shutil.copytree(written[name], tmp_path / name)
    file = folder / "vae" / "config.json"
    scales = {"shift_factor": 0.3, "latents_mean": [1.0, 2.0, -1.0, 0.5], "latents_std": [2.0] * 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | scales))
    assert (paint(folder) - paint_with_diffusers(folder)).abs().max() < 1e-4


def test_an_empty_prompt_is_zeros_where_the_folder_says_so(written, tmp_path):
    encoded = folders.write_sdxl(tmp_path / "encoded", zeros=False)
    pictures = [paint(place) for place in (written["sdxl"], encoded)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    assert (pictures[1] - paint_with_diffusers(encoded)).abs().max() < 1e-4


def test_the_network_of_an_inpainting_folder_reads_what_diffusers_gives_it(written):
    pipe = ldm.load(written["inpainting"])
    assert pipe.task == {
        "_target_": "ldm.diffusion.tasks.inpainting.Inpainting",
        "mask_resize": "nearest",
        "restore": False,
    }
    peer = DiffusionPipeline.from_pretrained(written["inpainting"])
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:9, 5:16] = 1
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    encode = pipe.pipeline.components.autoencoder.encode
    concat = Inpainting(mask_resize="nearest")._mask_channels(image, mask, encode, like=latents)
    rest = peer.vae.encode(image * (mask < 0.5)).latent_dist.mode() * peer.vae.config.scaling_factor
    theirs = torch.cat([torch.nn.functional.interpolate(mask, (8, 8)), rest], dim=1)
    assert torch.allclose(concat, theirs, atol=1e-5)
    wider = Inpainting()._mask_channels(image, mask, encode, like=latents)[:, :1]
    assert wider.sum() > concat[:, :1].sum(), "max pooling hides cells that the mask cuts through"
    files = {"image": folders.make_picture(), "mask": folders.make_mask()}
    images = pipe("a red circle", **files, steps=2, progress=False)
    assert images[0].size == (16, 16)


def test_an_inpainting_folder_gives_the_picture_of_diffusers(written, tmp_path):
    folder = shutil.copytree(written["inpainting"], tmp_path / "inpainting")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():  # diffusers draws from the posterior: let it have no deviation
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    vae.save_pretrained(folder / "vae")
    peer, ours = DiffusionPipeline.from_pretrained(folder), ldm.load(folder, "guidance.scale=5")
    peer.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "pt"}
    how |= {"image": folders.make_picture(), "mask_image": folders.make_mask()}
    how |= {"height": folders.SIDE, "width": folders.SIDE}
    theirs = 2 * peer("a red circle", generator=torch.Generator().manual_seed(3), **how).images - 1
    files = {"image": folders.make_picture(), "mask": folders.make_mask()}
    how = {"seeds": 3, "steps": 10, "output_type": "pt", "progress": False}
    assert theirs.std() > 0.1
    assert (ours("a red circle", **files, **how) - theirs).abs().max() < 1e-4


def test_what_a_folder_is_comes_from_its_files(written):
    assert is_published(written["sd1"])
    assert not is_published(written["sd1"] / "unet")
    source = open_published(str(written["sd2"]))
    assert source.config.objective.prediction.kind == "v"
    assert source.config.model.heads == [2, 4]
    assert source.config.data.size == folders.SIDE
    assert source.step == 0
    built = ldm.load(written["sd2"]).pipeline.components
    assert source.hash_frozen("autoencoder") == hash_module(built.autoencoder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("StableDiffusionUpscalePipeline", "x4 upscaler"),
        ("StableDiffusionDepth2ImgPipeline", "depth map"),
        ("StableDiffusionControlNetPipeline", "ControlNet"),
        ("StableDiffusion3Pipeline", "transformer"),
        ("FluxPipeline", "transformer"),
        ("KandinskyPipeline", "KandinskyPipeline"),
    ],
)
def test_other_pipelines_are_refused_by_name(sd1, name, what):
    change_index(sd1, _class_name=name)
    with pytest.raises(
        UsageError, match=rf"ckpt=.* cannot be opened: it is a {name}.*{what}|{what}"
    ):
        ldm.load(sd1)
    assert is_foreign_pipeline(str(sd1))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet, which is not read here"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "its unet is a UNet3DConditionModel"),
        ({"text_encoder": [None, None]}, "names no text_encoder"),
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None]}, "refiner"),
    ],
)
def test_other_parts_are_refused_by_name(sd1, changes, what):
    change_index(sd1, **changes)
    with pytest.raises(UsageError, match=what):
        ldm.load(sd1)


def change_index(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_network_of_four_extra_channels_is_refused(sd1):
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(sd1 / "unet"), in_channels=8
    ).save_pretrained(sd1 / "unet")
    with pytest.raises(UsageError, match="8 input channels for 4 of latents"):
        ldm.load(sd1)


def test_parts_that_change_no_weights_are_left_out_with_a_word(sd1, capsys):
    change_index(sd1, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    ldm.load(sd1)
    [line] = capsys.readouterr().err.splitlines()
    assert "left out: safety_checker" in line
    assert "the sampler is the folder's (sampler=pndm" in line
    assert "guidance.scale=7.5 is that of its pipeline in diffusers" in line
    ldm.load(sd1, "sampler=ddim", "guidance.scale=7")
    line = capsys.readouterr().err
    assert "the sampler is the command's, the guidance is the command's, guidance.scale=7" in line


def test_the_guidance_scale_is_that_of_the_pipeline_of_diffusers(written, sd1):
    assert ldm.load(written["sdxl"]).settings["guidance"]["scale"] == 5
    assert ldm.load(written["inpainting"]).settings["guidance"]["scale"] == 7.5
    change_index(sd1, _ldm_guidance_scale=2.0)
    assert ldm.load(sd1).settings["guidance"]["scale"] == 2
    assert ldm.load(sd1, "guidance=none").settings["guidance"]["scale"] == 1
    change_index(sd1, _ldm_guidance_scale="much")
    with pytest.raises(UsageError, match="_ldm_guidance_scale=much is no number"):
        ldm.load(sd1)


def test_half_precision_files_and_shards_are_found(written, tmp_path):
    half = folders.write_sd1(tmp_path / "half", variant="fp16")
    assert (half / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert not (half / "unet" / "diffusion_pytorch_model.safetensors").exists()
    parts = folders.write_sd1(tmp_path / "parts", max_shard_size="20KB")
    assert len([*(parts / "unet").glob("*-of-*.safetensors")]) > 1
    both = folders.write_sd1(tmp_path / "both", variant="fp16", max_shard_size="20KB")
    plain = paint(written["sd1"])
    for folder in (half, parts, both):
        assert torch.equal(paint(folder), plain)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return Path.touch, (Path(self.place),)


def test_pickles_are_opened_as_plain_tensors_alone(sd1, written):
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = load_file(sd1 / part / f"{name}.safetensors")
        (sd1 / part / f"{name}.safetensors").unlink()
        name = "pytorch_model" if name == "model" else name
        torch.save(weights, sd1 / part / f"{name}.bin")
    assert torch.equal(paint(sd1), paint(written["sd1"]))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        place = shutil.copytree(sd1, sd1.parent / f"evil-{part}")
        torch.save({"weight": Evil(place / "ran")}, place / part / f"{name}.bin")
        with pytest.raises(UsageError):
            ldm.load(place)
        assert not (place / "ran").exists()


def test_another_autoencoder_may_be_given(sd1, written):
    torch.manual_seed(9)
    folders.autoencoder().save_pretrained(sd1.parent / "other")
    pipe = ldm.load(sd1, f"autoencoder={sd1.parent / 'other'}")
    assert pipe.describe()["autoencoder"] == str(sd1.parent / "other")
    assert "autoencoder" not in ldm.load(sd1).describe()


def test_weights_without_ema_are_refused(sd1):
    with pytest.raises(UsageError, match="holds one set of weights: leave raw=true out"):
        ldm.load(sd1, "raw=true")


def test_its_training_images_are_not_known(sd1):
    with pytest.raises(UsageError, match="names no images: give data=DIR"):
        open_run_images(ldm.load(sd1), 16)
