"""A trained model as one folder: written whole or not at all, read on another machine."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pipeline_text import write_sdxl_text
from safetensors.torch import load_file, save
from shell import run
from tiny_t5 import save_tiny_t5

import ldm
from ldm.cli.bundle import main
from ldm.config.bundle import COMPONENT_WRITERS, write_bundle
from ldm.config.composition import isolate_hydra
from ldm.config.config_check import compose_config
from ldm.config.registry import list_component_targets
from ldm.experiments.model_card import copy_metrics, copy_samples
from ldm.utils.bundle_file import BUNDLE_WEIGHTS_FILE, read_bundle
from ldm.utils.checkpoint_file import CheckpointError, write_checkpoint
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_file, hash_module

BRIEF = [
    *("data.count=8", "data.val_count=8", "data.batch_size=4", "data.workers=0", "trainer=cpu"),
    *("samples.n=2", "samples.steps=1", "eval=none", "logger=csv", "trainer.max_steps=1"),
    "validate_first=false",
]
AUTOENCODER = OmegaConf.create(
    {
        "_target_": "ldm.models.diffusers_format.make_autoencoder_kl",
        "path": None,
        "latent_channels": 4,
        "channels": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "groups": 0,
        "attention": False,
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run whose autoencoder is a folder of its own, and its bundle."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    try:
        shutil.copytree(resolve_path("packaged:autoencoder"), "ae")
        ldm.train(ldm.compose("train", [*BRIEF, "name=first", "autoencoder.path=ae"]))
        ldm.evaluate("runs/first", "features=none", "count=2", "steps=1")
    finally:
        os.chdir(before)
    words = ("ckpt=runs/first", "out=shared/model v1.0", "license=cc-by-4.0")
    printed = run("-m", "ldm", "bundle", *words, cwd=folder)
    assert "shared/model v1.0: 4" in printed
    return folder


@pytest.fixture
def bundle(home, tmp_path, monkeypatch):
    """The bundle on another machine: nothing of the run is there."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(home / "shared" / "model v1.0", tmp_path / "bundle"))


def rewrite(bundle: Path, name: str, data: bytes) -> None:
    """Replaces a file of a bundle, with the digest that it then has."""
    (bundle / name).write_bytes(data)
    facts = json.loads((bundle / "bundle.json").read_text())
    facts["files"][name] = {"size": len(data), "sha256": hash_file(bundle / name)}
    (bundle / "bundle.json").write_text(json.dumps(facts))


def generate(ckpt, *words: str) -> torch.Tensor:
    pipe = ldm.load(ckpt, *words)
    return pipe("a big red heart", seeds=[0, 1], steps=2, output_type="pt", progress=False)


def test_it_gives_the_images_of_the_run(home, bundle, monkeypatch):
    images = generate(bundle)
    monkeypatch.chdir(home)
    assert torch.equal(images, generate("runs/first"))


def test_it_holds_all_files_with_digests_and_no_pickle(home, bundle):
    facts = json.loads((bundle / "bundle.json").read_text())
    paths = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert paths == {*facts["files"], "bundle.json"}
    for name, each in facts["files"].items():
        assert each == {"size": (bundle / name).stat().st_size, "sha256": hash_file(bundle / name)}
    assert {Path(name).suffix for name in paths} == {
        ".json",
        ".yaml",
        ".safetensors",
        ".md",
        ".png",
    }
    assert {*facts["copies"]} == {"autoencoder", "text_encoder"}
    modes = {path.stat().st_mode for path in (home / "shared/model v1.0").rglob("*.*")}
    assert len(modes - {(home / "ae").stat().st_mode}) == 1, "all can be read by the same people"
    assert [path.name for path in (home / "shared").iterdir()] == ["model v1.0"]


def test_the_model_card_says_what_it_is(bundle):
    card = (bundle / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "ldm", "pipeline_tag": "text-to-image", "license": "cc-by-4.0"}
    for words in (
        "# model v1.0",
        "6.8 M parameters for images of 64 x 64 pixels, trained with ldm for 1 steps",
        "![samples of the training](samples.png)",
        "ldm sample ckpt='model v1.0' prompt=",
        'ldm.load("model v1.0")',
        "path=ae",
        "digest of 8 images for training: ",
        "- val/loss: ",
        "- scene_accuracy: ",
        hash_file(bundle / BUNDLE_WEIGHTS_FILE),
    ):
        assert words in card
    assert "trust" not in card


def test_it_is_evaluated_and_starts_other_runs(bundle, capsys):
    metrics = ldm.evaluate("bundle", "features=none", "count=2", "steps=1")
    assert metrics["scene_accuracy"] == 0
    facts = json.loads(Path("evaluated/bundle/metrics.json").read_text())
    assert facts["digest"] == hash_file(bundle / BUNDLE_WEIGHTS_FILE)
    cfg = ldm.compose("train", [*BRIEF, "init=bundle", "name=next", "samples.n=0"])
    assert ldm.train(cfg)["status"] == "finished"
    assert "init: the weights of bundle" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_take_it(bundle, tmp_path):
    run("-m", "ldm", "sample", "ckpt=bundle", "prompt=a star", "steps=1", "n=1", cwd=tmp_path)
    assert (tmp_path / "samples" / "a-star_000.png").is_file()


def test_raw_weights_are_not_in_it(bundle):
    with pytest.raises(ValueError, match="bundle is a bundle, with averaged weights alone"):
        ldm.load("bundle", "raw=true")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (BUNDLE_WEIGHTS_FILE, lambda data: data[:-1] + b"x", "does not have the digest"),
        (BUNDLE_WEIGHTS_FILE, None, f"no whole bundle: {BUNDLE_WEIGHTS_FILE} is missing"),
        ("config.yaml", lambda data: data + b" ", "config.yaml does not have the digest"),
        ("bundle.json", lambda data: data[:50], "bundle.json cannot be used"),
        ("bundle.json", lambda data: data.replace(b'"format": 1', b'"format": 2'), "format is 2"),
        ("bundle.json", lambda data: b"[]", "bundle.json cannot be used"),
        ("autoencoder/diffusion_pytorch_model.safetensors", None, "no weights at"),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(bundle, name, damage, message):
    path = bundle / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ldm.load(bundle)


def test_other_frozen_components_are_refused(bundle):
    weights = bundle / "autoencoder" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + bytes(4))
    with pytest.raises(ValueError, match=r"is not the autoencoder that .* was trained with"):
        ldm.load(bundle)


def test_a_strangers_bundle_runs_no_code_and_reads_nothing_else(bundle, tmp_path):
    config = yaml.safe_load((bundle / "config.yaml").read_text())
    config["scheduler"] = {"_target_": "os.mkdir", "path": "made"}
    rewrite(bundle, "config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(ValueError, match=r"asks to call 'os.mkdir'"):
        ldm.load(bundle)
    with pytest.raises(ValueError, match=r"os is no package of your own, leave it out"):
        ldm.load(bundle, trust=["os"])
    config["scheduler"] = {"_target_": "own_noise.schedules.PowerSchedule", "shift": -3.0}
    rewrite(bundle, "config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(ValueError, match=r"add trust=\[own_noise\]"):
        ldm.load(bundle)
    assert ldm.load(bundle, trust=["own_noise"]).trust == ("own_noise",)
    facts = json.loads((bundle / "bundle.json").read_text())
    for place in ("/etc", "../ae"):
        facts["copies"]["autoencoder"] = place
        (bundle / "bundle.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=f"'{place}' is outside of the bundle"):
            read_bundle(bundle)
    for place in ("${oc.env:HOME}", "???", "gone\0"):  # never looked up, nor searched on the hub
        facts["copies"]["autoencoder"] = place
        (bundle / "bundle.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=f"no whole bundle: .*{re.escape(place)}"):
            ldm.load(bundle, trust=["own_noise"])
    assert not Path("made").exists()


def test_a_folder_may_have_nearly_any_name(bundle):
    bundle = bundle.rename("a=b, [c]")
    assert isinstance(generate(bundle), torch.Tensor)
    bundle = bundle.rename("my ${oc.env:HOME}")
    with pytest.raises(ValueError, match=r"a path with \$\{ cannot be used here"):
        ldm.load(bundle)


def test_weights_that_are_not_finite_are_refused(bundle):
    weights = load_file(bundle / BUNDLE_WEIGHTS_FILE)
    weights[next(iter(weights))][0] = float("nan")
    rewrite(bundle, BUNDLE_WEIGHTS_FILE, save(weights))
    with pytest.raises(CheckpointError, match="its weights are not finite"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x"], "ckpt is needed"),
        (["ckpt=runs/first"], "out is needed: give out=..."),
        (["ckpt=runs/gone", "out=x"], "ckpt='runs/gone' is neither a run directory"),
        (["ckpt=runs/first", "out=ae"], "out=ae exists and is no empty folder"),
        (["ckpt=runs/first", "out=runs/first/x"], "inside of"),
        (["ckpt=runs/first", "out=shared/model v1.0/x"], "inside of"),
        (["ckpt=runs/first", "out=x", "frozen=link"], "frozen=link must be one of copy, reference"),
        (["ckpt=shared/model v1.0", "out=x"], "is a bundle already: copy its folder"),
    ],
)
def test_what_cannot_be_bundled_is_refused_and_leaves_nothing(
    home, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(home)
    before = sorted(home.rglob("*"))
    monkeypatch.setattr("sys.argv", ["ldm", *words])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
    assert sorted(home.rglob("*")) == before


def test_a_reference_names_what_it_needs(home, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(home)
    words = ("ckpt=runs/first", f"out={tmp_path}/small", "frozen=reference")
    monkeypatch.setattr("sys.argv", ["ldm", *words])
    main()
    assert "autoencoder: not copied, it is read from ae" in capsys.readouterr().out
    assert not (tmp_path / "small" / "autoencoder").exists()
    generate(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ldm.UsageError, match="If the autoencoder has moved, give autoencoder=PATH"):
        ldm.load("small")
    generate("small", f"autoencoder={home}/ae")


def write_labels(folder: Path) -> dict:
    folder.joinpath("labels.txt").write_text("red heart\nblue star\n")
    return {"_target_": "ldm.models.text.labels.LabelTextEncoder", "names": f"{folder}/labels.txt"}


def write_autoencoder(folder: Path) -> dict:
    """A checkpoint of a training, whose latent scale has no inverse in float32."""
    autoencoder = instantiate(AUTOENCODER)
    autoencoder.set_scale(torch.rand(4), torch.rand(4) + 0.5)
    state = {f"autoencoder.{name}": value for name, value in autoencoder.state_dict().items()}
    facts = {"stage": "autoencoder", "config": "", "frozen": {}}
    path = folder / "trained.ckpt"
    write_checkpoint({"state_dict": state, "global_step": 1, "ldm": facts}, path)
    return {**AUTOENCODER, "path": str(path)}


def write_t5(folder: Path) -> dict:
    path = save_tiny_t5(folder / "t5", ["a red heart", "a blue star"])
    return {"_target_": "ldm.models.text.t5.T5TextEncoder", "path": str(path), "max_length": 8}


def write_pair(folder: Path) -> dict:
    path = write_sdxl_text(folder / "pipeline")
    return {"_target_": "ldm.models.text.paired.PairedTextEncoder", "path": str(path)}


CLIP = {"_target_": "ldm.models.text.clip.ClipTextEncoder", "path": "packaged:clip"}
FROZEN = {
    "labels": write_labels,
    "autoencoder": write_autoencoder,
    "t5": write_t5,
    "clip": lambda folder: CLIP,
    "skipped clip": lambda folder: {**CLIP, "layer": -2, "norm": False},
    "projected clip": lambda folder: {**CLIP, "pooled": True, "projected": True},
    "pair": write_pair,
    "whitened clip": lambda folder: {**CLIP, "pooled": True},
    "style": lambda folder: {**CLIP, "_target_": "ldm.models.style.ClipStyleEncoder"},
}


@pytest.mark.parametrize("write", FROZEN.values(), ids=FROZEN)
def test_a_copy_of_a_frozen_component_has_its_digest(write, tmp_path):
    part = OmegaConf.create(write(tmp_path))
    place = COMPONENT_WRITERS[part._target_](part, tmp_path / "copy")
    copied = {**part, ("names" if "names" in part else "path"): f"{tmp_path}/copy{place}"}
    assert hash_module(instantiate(copied)) == hash_module(instantiate(part))


def test_each_writer_is_of_a_target_of_conf():
    assert COMPONENT_WRITERS.keys() <= set().union(*list_component_targets().values())


@pytest.mark.parametrize("text", ["[]", '{"step": 1}', '{"step": 1, "metrics": {"a": "x"}}'])
def test_damaged_metrics_are_named_and_not_copied(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ValueError, match=r"metrics\.json is not what ldm evaluate wrote"):
        copy_metrics(tmp_path, tmp_path / "bundle", 1)
    assert not any((tmp_path / "bundle").iterdir())


def test_links_in_a_run_are_not_followed(tmp_path):
    (tmp_path / "secret.json").write_text('{"step": 1, "metrics": {}}')
    (tmp_path / "metrics.json").symlink_to("secret.json")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step=00000001.png").symlink_to("../secret.json")
    (tmp_path / "bundle").mkdir()
    copy_metrics(tmp_path, tmp_path / "bundle", 1)
    copy_samples(tmp_path, tmp_path / "bundle")
    assert not any((tmp_path / "bundle").iterdir())


def test_a_folder_that_appears_meanwhile_is_left_alone(home, monkeypatch):
    monkeypatch.chdir(home)
    Path("taken").mkdir()
    Path("taken", "mine.txt").write_text("mine")
    with isolate_hydra():
        cfg = compose_config("bundle", [])
    cfg.license = None
    with pytest.raises(ValueError, match="out=taken was made meanwhile"):
        write_bundle(cfg, "runs/first", Path("taken"), {})
    assert [path.name for path in Path("taken").iterdir()] == ["mine.txt"]
    assert not list(Path().glob(".taken*"))
