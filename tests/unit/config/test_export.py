"""A run as a folder that diffusers opens: the same picture, and all refusals at once."""

import io
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, DiffusionPipeline
from hub_uploads import UploadHub
from PIL import Image
from pipeline_text import write_sdxl_text
from safetensors.torch import load_file
from shell import ROOT, run

import ldm
from ldm.cli.export import check_export_folder
from ldm.config.components import build_frozen_encoders, load_diffusion_checkpoint
from ldm.config.composition import compose_default_config, isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.diffusers_scheduler import adapt_scheduler_config
from ldm.config.export import write_export
from ldm.config.export_check import describe_export, list_export_obstacles
from ldm.config.published import open_published
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import train_tokenizer
from ldm.models.diffusers_format import save_autoencoder
from ldm.utils.checkpoint_file import read_checkpoint
from ldm.utils.errors import UsageError

BRIEF = [
    *("model.channels=16", "model.embedding=48", "data.count=8", "data.val_count=8"),
    *("data.batch_size=4", "data.workers=0", "trainer=cpu", "samples.n=2", "samples.steps=1"),
    *("eval=none", "logger=csv", "validate_first=false", "trainer.max_steps=6"),
    *("optimizer.warmup=1", "optimizer.lr=2e-2", "ema_decay=0.5"),  # so that it paints something
]
DEMO = ["experiment=demo_sd", "autoencoder.path=ae", "autoencoder.channels=8"]
EXPORTED = "shared/model v1.0"
NOISE = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a big red heart", ""]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, its autoencoder, and its export in float32."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        sizes = {"latent_channels": 12, "channels": 8, "multipliers": [1, 1, 2, 4], "blocks": 1}
        autoencoder = AutoencoderKL(**sizes, groups=1, attention=False)
        autoencoder.set_scale(torch.linspace(-1, 1, 12), torch.linspace(0.5, 3, 12))
        save_autoencoder(autoencoder, folder / "ae", dtype=torch.float32, exact_scale=True)
        with redirect_stdout(io.StringIO()) as printed:
            ldm.train(ldm.compose("train", [*BRIEF, *DEMO, "name=small"]))
        assert "This run exports to diffusers" in printed.getvalue()
    finally:
        os.chdir(before)
    words = ("ckpt=runs/small", f"out={EXPORTED}", "license=cc-by-4.0")
    assert f"{EXPORTED}: " in run("-m", "ldm", "export", *words, cwd=folder)
    return folder


def load_quietly(folder: Path, **options):
    """The pipeline of diffusers; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of files of the training before
        return DiffusionPipeline.from_pretrained(folder, **options)


def paint(ckpt: str, *words: str) -> torch.Tensor:
    """Our pictures in [0, 1] of the noise `NOISE`."""
    pipeline = ldm.load(ckpt, *words, device="cpu").pipeline
    return pipeline.generate_from_noise(NOISE, PROMPTS, steps=10) / 2 + 0.5


def test_diffusers_paints_the_same_picture(home, monkeypatch, caplog):
    monkeypatch.chdir(home)
    ours, pipe = paint("runs/small"), load_quietly(EXPORTED)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    pipe.set_progress_bar_config(disable=True)
    how = {"latents": NOISE, "num_inference_steps": 10, "guidance_scale": 2.0}
    theirs = pipe(PROMPTS, **how, output_type="pt").images
    assert ours.std() > 0.05
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    for words in ("were passed", "not expected", "not used", "ignored", "deprecated", "outdated"):
        assert words not in caplog.text


def test_an_export_opens_again_with_the_same_weights(home, monkeypatch):
    monkeypatch.chdir(home)
    source = load_diffusion_checkpoint("runs/small")
    weights, again = source.read_weights(), open_published(EXPORTED).read_weights()
    assert weights.keys() == again.keys()
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name
    before, after = (
        build_frozen_encoders(each.config)[1].state_dict()
        for each in (source, open_published(EXPORTED))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    before = paint("runs/small")
    for words in ([], ["sampler=ddim"]):  # the sampler that the folder names, and that of the run
        torch.testing.assert_close(paint(EXPORTED, *words), before, atol=1e-4, rtol=0)


def test_the_folder_holds_what_diffusers_reads_and_no_pickle(home):
    folder = home / EXPORTED
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        *("README.md", "samples.png", "model_index.json", "scheduler/scheduler_config.json"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    assert [path.name for path in (home / "shared").iterdir()] == ["model v1.0"]
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.*")} == {0o644}


def test_the_code_of_the_model_card_paints_a_picture(home, monkeypatch):
    card = (home / EXPORTED / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    facts = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "cc-by-4.0"}
    assert head == facts
    for words in ("trained with ldm for 6 steps", "path=ae", "digest of 8 images for training: "):
        assert words in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace("num_inference_steps=30", "num_inference_steps=2")
    monkeypatch.chdir(home / "shared")
    exec(code, {})
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)
    Path("picture.png").unlink()


def test_weights_without_ema_in_half_precision_replace_an_export(home, monkeypatch):
    monkeypatch.chdir(home)
    words = ["ckpt=runs/small", "out=raw", "raw=true", "dtype=float16", "sampler=dpmpp_2m"]
    with isolate_hydra():
        cfg = compose_config("export", words)
    check_export_folder(Path("raw"), overwrite=False)
    with pytest.raises(UsageError, match="a file that diffusers loads: runs/<name>/lora"):
        check_export_folder(Path("raw.safetensors"), overwrite=False)
    write_export(cfg, "runs/small", Path("raw"), {})
    with pytest.raises(UsageError, match="raw is there already: overwrite=true"):
        check_export_folder(Path("raw"), overwrite=False)
    check_export_folder(Path("raw"), overwrite=True)
    Path("raw/unet/mine.txt").touch()
    write_export(cfg, "runs/small", Path("raw"), {})
    assert not Path("raw/unet/mine.txt").exists()
    for file in Path("raw").rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}, file
    weights = load_file("raw/unet/diffusion_pytorch_model.safetensors")
    payload = read_checkpoint(Path("runs/small/checkpoints/last.ckpt"))
    wanted = payload["state_dict"]["denoiser.conv_in.weight"].half()
    assert torch.equal(weights["conv_in.weight"], wanted)
    pipe = load_quietly("raw", dtype=torch.float16)
    assert "DPMSolver" in type(pipe.scheduler).__name__
    card = Path("raw/README.md").read_text()
    assert "not averaged" in card
    assert "pipe.to(torch.float16)" in card


def test_a_disk_that_is_full_is_named_and_leaves_nothing(home, monkeypatch):
    monkeypatch.chdir(home)
    with isolate_hydra():
        cfg = compose_config("export", ["ckpt=runs/small", "out=full"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((UsageError, OSError), match="full"):
            write_export(cfg, "runs/small", Path("full"), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in home.iterdir() if "full" in path.name]


@pytest.mark.slow
def test_an_export_that_is_stopped_leaves_nothing(home):
    words = [sys.executable, "-m", "ldm", "export", "ckpt=runs/small", "out=stopped"]
    process = subprocess.Popen(words, cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.poll() is None and not [*home.glob(".stopped.*/*")]:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not [path for path in home.iterdir() if "stopped" in path.name]


def test_a_process_without_ldm_paints_the_pictures_of_a_run_and_of_its_adapters(home, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(home)
    from benchmarks.export_demo import main, paint_apart

    results = main(["ckpt=runs/small", f"folder={EXPORTED}", "count=2", "steps=2"])
    assert results["ldm"] == results["diffusers"]
    assert {"scene_accuracy", "scene_color_unseen"} <= results["ldm"].keys()
    words = [*BRIEF, *DEMO, "samples.n=0", "name=style", "init=runs/small", "lora.rank=2"]
    ldm.train(ldm.compose("train", [*words, "lora.targets=all", "optimizer.lr=0.1"]))
    words = {"steps": 10, "lora": "runs/style/lora.safetensors"}
    theirs = paint_apart(EXPORTED, NOISE.numpy(), PROMPTS, **words).transpose(0, 3, 1, 2)
    ours = paint("runs/style")
    assert (ours - paint("runs/small")).abs().max() > 1e-2
    assert abs(theirs - ours.clamp(0, 1).numpy()).max() < 1e-4


def export_variant(*words: str, out: str) -> DiffusionPipeline:
    """A run with other components than the first one, in diffusers."""
    with redirect_stdout(io.StringIO()) as printed:
        ldm.train(ldm.compose("train", [*BRIEF, "samples.n=0", f"name={out}", *words]))
    assert "This run exports to diffusers" in printed.getvalue()
    with isolate_hydra():
        cfg = compose_config("export", [])
    write_export(cfg, f"runs/{out}", Path(out), {})
    pipe = load_quietly(out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pair_of_text_encoders_and_a_tiny_autoencoder_become_sdxl(home, monkeypatch):
    monkeypatch.chdir(home)
    write_sdxl_text(Path("pair"), train_tokenizer(PROMPTS, vocab_size=600))
    torch.manual_seed(0)
    levels = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1, 1, 1, 1) for part in ("encoder", "decoder")}
    AutoencoderTiny(**levels, **blocks).save_pretrained("taesd")
    words = ["model=demo_sd", "text_encoder=sdxl", "text_encoder.path=pair"]
    words += ["autoencoder=diffusers", "autoencoder.path=taesd", "+model.size_embedding=8"]
    pipe = export_variant(*words, out="xl")
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    ours = ldm.load("runs/xl", device="cpu").pipeline
    ours = ours.generate_from_noise(NOISE[:, :4], PROMPTS[:1] * 2, steps=4) / 2 + 0.5
    how = {"latents": NOISE[:, :4], "num_inference_steps": 4, "guidance_scale": 2.0}
    theirs = pipe(PROMPTS[:1] * 2, **how, output_type="pt").images
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_an_inpainting_run_becomes_its_pipeline(home, monkeypatch):
    monkeypatch.chdir(home)
    autoencoder = AutoencoderKL(channels=8, blocks=1, groups=1, attention=False)
    autoencoder.set_scale(0.0, 0.18215)
    save_autoencoder(autoencoder, Path("ae4"), dtype=torch.float32, exact_scale=True)
    words = [*DEMO, "autoencoder.path=ae4", "autoencoder.latent_channels=4", "task=inpaint"]
    pipe = export_variant(*words, "autoencoder.multipliers=[1,2,4,4]", out="holes")
    assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
    assert pipe.vae.config.scaling_factor == 0.18215
    wanted = autoencoder.state_dict()["quant_conv.weight"]
    assert torch.equal(pipe.vae.quant_conv.weight, wanted), "as it was"
    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    picture = pipe("a star", image=image, mask_image=mask, height=64, width=64, strength=1.0)
    assert picture.images[0].size == (64, 64)


def test_all_that_diffusers_cannot_hold_is_named_at_once(home):
    cfg = compose_default_config("train", [])
    found = list_export_obstacles(cfg)
    assert len(found) == 3
    causes = "model.positional_waves=4, autoencoder.patch=4, groups=0, text_encoder.pooled=true"
    assert f"diffusers cannot hold {causes}." in describe_export(cfg)
    cfg = compose_default_config("train", ["experiment=moving", "style_encoder=clip"])
    cfg["text_encoder"] = compose_default_config("train", ["text_encoder=t5"])["text_encoder"]
    cfg["scheduler"]["_target_"] = "mypackage.schedules.cosine"
    found = "; ".join(list_export_obstacles(cfg))
    for words in ("task (", "style_encoder (", "text_encoder (", "scheduler=mypackage."):
        assert words in found


@pytest.mark.parametrize("words", [["experiment=demo_sd"], ["autoencoder=sd", "model=base"]])
def test_what_can_be_exported_has_no_obstacles(words):
    cfg = compose_default_config("train", [*words, "text_encoder=clip_l14"])
    assert describe_export(cfg) == "This run exports to diffusers: ldm export"


def test_what_the_pipeline_would_change_of_the_scheduler_is_refused():
    config = {"steps_offset": 0, "timestep_spacing": "leading", "clip_sample": False}
    with pytest.raises(ValueError, match=r"take sampler\.offset=1, or spacing=trailing"):
        adapt_scheduler_config(config, paired=False)
    assert adapt_scheduler_config(config, paired=True) == config
    trailing = config | {"timestep_spacing": "trailing"}
    assert adapt_scheduler_config(trailing, paired=False)["steps_offset"] == 1
    with pytest.raises(ValueError, match=r"sampler\.clip"):
        adapt_scheduler_config(trailing | {"clip_sample": True}, paired=False)


def test_nothing_is_uploaded_without_a_token(home, tmp_path):
    words = ("ckpt=runs/small", f"out={tmp_path / 'x'}", "push=user/name")
    printed = run("-m", "ldm", "export", *words, cwd=home, expect=2, HF_HOME=str(tmp_path))
    assert "push=user/name needs a token" in printed
    assert not (tmp_path / "x").exists()


def test_push_uploads_the_folder_with_the_token_of_the_environment(home, tmp_path):
    hub = UploadHub()
    words = ("ckpt=runs/small", "out=pushed", "push=team/model", "private=true")
    env = {"HF_TOKEN": "hf_s3cret", "HF_ENDPOINT": hub.root, "HF_HUB_OFFLINE": "0"}
    printed = run("-m", "ldm", "export", *words, cwd=home, HF_HOME=str(tmp_path), **env)
    assert f"uploaded to {hub.root}/team/model" in printed
    assert hub.users == {"Bearer hf_s3cret"}
    created = hub.created[0]  # older versions of huggingface_hub say `private`
    assert created.get("visibility") == "private" or created.get("private")
    folder = home / "pushed"
    written = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert hub.files == written
    assert 'from_pretrained("team/model"' in written["README.md"].decode()
