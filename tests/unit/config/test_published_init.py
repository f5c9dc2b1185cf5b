"""`init=FOLDER`: a training that starts from a published model."""

import shutil

import published_folders as folders
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import ldm
from ldm.config.bundle import write_bundle
from ldm.config.composition import isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.export import write_export
from ldm.config.pipeline import load_cascade
from ldm.utils.errors import UsageError

BRIEF = [
    *("data.count=8", "data.val_count=4", "data.size=16", "data.batch_size=4", "data.workers=0"),
    *("trainer=cpu", "samples.n=0", "eval=none", "logger=csv", "validate_first=false"),
    *("trainer.max_steps=1", "optimizer.lr=1e-4"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with published models, and the run `tuned` that started from one."""
    home = tmp_path_factory.mktemp("home")
    folders.write_sd1(home / "sd1")
    folders.write_sd2(home / "sd2")
    folders.write_sdxl(home / "sdxl")
    folders.write_inpainting(home / "inpainting")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train("init=sd1", "name=tuned")
    return home


@pytest.fixture(autouse=True)
def _in_home(home, monkeypatch):
    monkeypatch.chdir(home)


def train(*words):
    return ldm.train(ldm.compose("train", [*BRIEF, *words]))


def export(run, out, *words):
    with isolate_hydra():
        cfg = compose_config("export", [*words])
    write_export(cfg, run, out, {})
    return out


def read_config(name):
    return yaml.safe_load(open(f"runs/{name}/config.yaml"))


def test_the_run_has_the_settings_of_the_folder(home):
    config = read_config("tuned")
    assert config["model"]["_target_"] == "ldm.models.unet.UNet"
    assert config["model"]["heads"] == 2
    assert config["autoencoder"]["path"] == "sd1/vae"
    assert config["text_encoder"]["path"] == "sd1"
    assert config["scheduler"]["_target_"] == "ldm.diffusion.schedules.scaled_linear"
    assert config["objective"]["prediction"]["kind"] == "eps"
    before = ldm.load("sd1").pipeline.components.denoiser.state_dict()
    after = ldm.load("runs/tuned", "raw=true").pipeline.components.denoiser.state_dict()
    changes = [(before[name] - after[name]).abs().max() for name in before]
    assert 0 < max(changes) < 1e-3, "a step of Adam from the published weights"


def test_a_run_has_the_guidance_scale_of_the_folder_it_began_from(home, tmp_path, capsys):
    capsys.readouterr()
    assert ldm.load("runs/tuned").settings["guidance"]["scale"] == 7.5
    assert "runs/tuned: guidance.scale=7.5 is that of its pipeline" in capsys.readouterr().err
    assert ldm.load("runs/tuned", "guidance.scale=3").settings["guidance"]["scale"] == 3
    card = (export("runs/tuned", tmp_path / "out") / "README.md").read_text()
    assert "guidance_scale=7.5" in card
    assert str(home) not in card
    assert ldm.load(tmp_path / "out").settings["guidance"]["scale"] == 7.5


def test_defaults_for_new_networks_are_named_with_the_remedy(capsys):
    words = [word for word in BRIEF if "lr" not in word]
    ldm.train(ldm.compose("train", [*words, "init=sd1", "name=defaults"]))
    line = capsys.readouterr().out
    assert "optimizer.lr=0.003 is for a small new network: give optimizer.lr=1e-5" in line
    assert "timestep_sampler=uniform (experiment=finetune_sd has such settings)" in line
    train("init=sd1", "timestep_sampler=uniform", "name=uniform")
    assert "experiment=finetune_sd" not in capsys.readouterr().out


def test_a_run_goes_on_and_samples_without_the_folders_network(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "sd1", tmp_path / "sd1")
    shutil.copytree(home / "runs" / "tuned", tmp_path / "runs" / "tuned", symlinks=True)
    shutil.rmtree(tmp_path / "sd1" / "unet")
    monkeypatch.chdir(tmp_path)
    assert train("init=sd1", "name=tuned", "trainer.max_steps=2")["steps"] == 2
    assert "init=sd1: model, autoencoder, text_encoder" in capsys.readouterr().out
    assert len(ldm.load("runs/tuned")("a red circle", steps=2, progress=False)) == 1
    with isolate_hydra():
        cfg = compose_config("bundle", [])
    write_bundle(cfg, "runs/tuned", tmp_path / "bundle", {})
    shutil.rmtree(tmp_path / "sd1")
    assert len(ldm.load("bundle")("a red circle", steps=2, progress=False)) == 1


def test_single_settings_and_chosen_options_stay(capsys):
    train("init=sd1", "name=single", "model.checkpointing=all", "objective.offset_noise=0.1")
    config = read_config("single")
    assert config["model"]["checkpointing"] == "all"
    assert config["model"]["heads"] == 2
    assert config["objective"]["offset_noise"] == 0.1
    assert config["objective"]["prediction"]["kind"] == "eps"
    capsys.readouterr()
    zero = ["objective=v", "scheduler=scaled_linear", "scheduler.zero_terminal_snr=true"]
    train("init=sd1", "name=zero", *zero)
    said = capsys.readouterr().out
    assert "init=sd1: model, autoencoder, text_encoder from there; " in said
    assert "scheduler, objective from the command" in said
    config = read_config("zero")
    assert config["objective"]["prediction"]["kind"] == "v"
    assert config["scheduler"]["zero_terminal_snr"]


def test_other_sizes_than_the_folders_are_named(capsys):
    train("init=sd1", "name=larger", "data.size=32")
    assert "it was trained on 16 pixels, and data.size=32 here" in capsys.readouterr().out


def test_sdxl_is_trained_with_both_text_encoders():
    train("init=sdxl", "name=xl")
    config = read_config("xl")
    assert config["text_encoder"]["_target_"] == "ldm.models.text.paired.PairedTextEncoder"
    assert config["model"]["depth"] == [1, 2]
    assert len(ldm.load("runs/xl")("a red circle", steps=2, progress=False)) == 1


def test_another_layer_of_the_text_encoder_may_be_trained_on():
    train("init=sd1", "name=skip", "+text_encoder.layer=-2")
    text_encoder = ldm.load("runs/skip").pipeline.components.text_encoder
    assert (text_encoder.layer, text_encoder.norm) == (-2, True)
    with pytest.raises(UsageError, match="was trained with another text_encoder"):
        train("init=sd1", "name=tiny", "text_encoder=tiny", "text_encoder.pooled=false")


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["init=sd1", "+text_encoder.layer=-2"], 1),
        (["init=sd2", "text_encoder=sd2", "text_encoder.path=sd2/text_encoder"], 2),
    ],
)
def test_an_export_has_the_layers_that_the_run_reads(words, layers, tmp_path):
    train(*words, "name=exported")
    folder = export("runs/exported", tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.text_encoder.config.num_hidden_layers == layers
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, how = ["a red circle", ""], {"num_inference_steps": 4, "guidance_scale": 7.5}
    theirs = pipe(prompts, latents=noise, **how, output_type="pt").images
    ours = ldm.load("runs/exported").pipeline.generate_from_noise(noise, prompts, steps=4)
    assert theirs.std() > 0.05
    torch.testing.assert_close(theirs, ours / 2 + 0.5, atol=1e-4, rtol=0)
    shutil.rmtree("runs/exported")


def test_an_export_in_bfloat16_has_the_rounded_weights(tmp_path):
    folder = export("runs/tuned", tmp_path / "out", "dtype=bfloat16")
    parts = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).components
    assert {parts[name].dtype for name in ("unet", "vae", "text_encoder")} == {torch.bfloat16}
    ours = ldm.load("runs/tuned").pipeline.components.denoiser.conv_in.weight.bfloat16()
    assert torch.equal(parts["unet"].conv_in.weight, ours)


def test_a_style_encoder_may_be_added(capsys):
    train("init=sd1", "style_encoder=clip", "name=style")
    assert "new, and without effect as yet: style" in capsys.readouterr().out


def test_inpainting_starts_from_both_kinds_of_folders(capsys):
    train("init=inpainting", "task=inpaint", "name=nine")
    assert "new, and without effect" not in capsys.readouterr().out
    train("init=sd1", "task=inpaint", "name=widened")
    assert "new, and without effect as yet: 5 input channels" in capsys.readouterr().out
    first = ldm.load("runs/widened", "raw=true").pipeline.components.denoiser.conv_in.weight
    plain = ldm.load("sd1").pipeline.components.denoiser.conv_in.weight
    assert torch.allclose(first[:, :4], plain, atol=1e-3)


def test_the_sampler_of_a_folder_is_that_of_a_cascades_first_stage_alone():
    train("task=superres", "task.scales=[2]", "data.size=32", "name=sr")
    with isolate_hydra():
        cfg = compose_config("sample", ["device=cpu"])
    stages = load_cascade(cfg, ["sd1", "runs/sr"], {})
    names = [type(each.pipeline.sampler).__name__ for each in stages]
    assert names == ["PNDMSampler", "DDIMSampler"]


def test_damaged_folders_are_measured_with_no_other_pipeline(home, tmp_path):
    folder = shutil.copytree(home / "sd1", tmp_path / "damaged")
    (folder / "unet" / "config.json").write_text("{")
    for what in ("unet/config.json is no JSON", "it has no .*unet/config.json: has its download"):
        with pytest.raises(UsageError, match=what):
            ldm.evaluate(folder, "data=scenes", "count=4")
        (folder / "unet" / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init=sd1", "model=nano"], "trained with another model: leave model=.. out"),
        (["init=sd1", "model.heads=4"], "trained with another model"),
        (["init=sd1", "text_encoder=tiny"], "another text_encoder"),
        (["init=sd1", "scheduler.offset=0.01"], "takes no 'offset'"),
        (["init=inpainting"], "trained with another task: add task=inpaint"),
        (["init=owner/name"], "init=owner/name is neither here nor to be had"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused(words, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=message):
        train(*words, "name=refused")


def test_a_run_does_not_go_on_with_other_frozen_weights(home):
    folder = shutil.copytree(home / "sd1", home / "changing")
    words = ["init=changing", "name=changing"]
    train(*words)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, file)
    with pytest.raises(UsageError, match="was trained with another autoencoder, whose files have"):
        train(*words, "trainer.max_steps=2")
    train(*words, "trainer.max_steps=2", "resume.allow=[autoencoder]")
