"""The packaged parts are what their cards say and serve their purpose; `ldm.package` makes such."""

import hashlib
import os
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from shell import ROOT, run
from world import write_shapes

from ldm.cli.package import (
    describe_training,
    measure_caption_recall,
    measure_scene_reconstruction,
    package_autoencoder,
)
from ldm.config.components import build_frozen_encoders
from ldm.config.composition import CONF_DIR
from ldm.data.scenes.world import sample_scene
from ldm.models.clip import Clip
from ldm.utils.checkpoint_file import write_checkpoint
from ldm.utils.errors import UsageError
from ldm.utils.files import resolve_path

ASSETS = {
    "autoencoder": {"diffusion_pytorch_model.safetensors"},
    "clip": {"model.safetensors", "whitening.safetensors"},
}
FIGURES = {
    "autoencoder": ["psnr_scenes_db", "reader_whole_scene"],
    "clip": [
        "image_to_text_recall_at_1_of_250",
        "image_to_text_recall_at_1_of_10_of_the_same_words",
    ],
}
HELD_OUT = range(3000, 3250)  # after those that training was watched on, and the cards' own


def check_card(folder, name):
    """The card of a part agrees with the files beside it; returns its text."""
    text = (folder / name / "README.md").read_text()
    told = dict(re.findall(r"^sha256 of (\S+): ([0-9a-f]{64})$", text, re.M))
    files = {file.name: file for file in (folder / name).glob("*.safetensors")}
    assert told.keys() == files.keys() == ASSETS[name]
    for file, digest in told.items():
        assert hashlib.sha256(files[file].read_bytes()).hexdigest() == digest, file
    assert re.search(r"`python train\.py [^`]+` \(seed \d+\)", text)
    assert re.search(rf"`python -m ldm\.package {name}=[^`]+`", text)
    assert re.search(r"took \d+ steps, \d+ images and \d+ minutes", text)
    for figure in FIGURES[name]:
        assert re.search(rf"^- {figure}: [\d.]+$", text, re.M), f"the card of {name} lacks {figure}"
    return text


@pytest.mark.parametrize("name", ASSETS)
def test_the_card_file_and_digest_agree(name):
    text = check_card(resolve_path("packaged:"), name)
    assert f"experiment={name}_tiny" in text, "`make assets` makes it"


def test_the_parts_are_small():
    folder = resolve_path("packaged:")
    assert {path.name for path in folder.iterdir()} == set(ASSETS)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8e6


def test_the_packaged_clip_finds_the_captions():
    clip = Clip.load("packaged:clip")
    assert measure_caption_recall(clip, [[sample_scene(i, split="val") for i in HELD_OUT]]) >= 0.9


def test_the_packaged_clip_reads_the_sentence_and_not_the_words_alone():
    families = [
        [sample_scene(i, split="train", seed=2, family=10) for i in range(first, first + 10)]
        for first in range(0, 200, 10)
    ]
    assert measure_caption_recall(Clip.load("packaged:clip"), families) >= 0.8


def test_the_packaged_autoencoder_keeps_what_pictures_show():
    autoencoder, _ = frozen(resolve_path("packaged:"))
    figures = measure_scene_reconstruction(autoencoder, HELD_OUT, size=64)
    assert figures["psnr_scenes_db"] >= 28
    assert figures["reader_whole_scene"] >= 0.97


@pytest.mark.slow
def test_runs_become_parts(tmp_path):
    brief = ["trainer=cpu", "trainer.max_steps=1", "logger=csv", "data=scenes", "data.count=8"]
    brief += ["data.val_count=4", "data.size=16", "data.batch_size=4", "data.workers=0", "seed=3"]
    for stage in ASSETS:
        more = [f"stage={stage}", f"name={stage}", "autoencoder.path=null", "vocab_size=600"]
        run(str(ROOT / "train.py"), *brief, *more, cwd=tmp_path)
    asked = ["autoencoder=runs/autoencoder", "clip=runs/clip", "out=parts", "scenes=4"]
    said = run("-m", "ldm.package", *asked, cwd=tmp_path)
    for name in ASSETS:
        text = check_card(tmp_path / "parts", name)
        assert f"`python train.py {' '.join(brief)} stage={name}" in text
        assert "(seed 3)" in text
        assert f"parts/{name}: {{" in said
    for stored, trained in zip(frozen(tmp_path / "parts"), frozen(tmp_path / "runs"), strict=True):
        weights = stored.state_dict()
        assert len(weights) > 10
        for name, weight in trained.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-6)


def frozen(folder):
    """The autoencoder and text encoder that a run takes from `folder`."""
    places = [f"autoencoder.path={folder}/autoencoder", f"text_encoder.path={folder}/clip"]
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return build_frozen_encoders(compose("train", overrides=["name=x", *places]))


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "parts" / "clip").mkdir(parents=True)
    (tmp_path / "parts" / "clip" / "README.md").write_text("mine")
    said = run("-m", "ldm.package", "clip=runs/x", "out=parts", cwd=tmp_path, expect=2)
    assert "parts/clip holds what is none of ldm.package's" in said


def test_nothing_to_package_is_told(tmp_path):
    said = run("-m", "ldm.package", cwd=tmp_path, expect=2)
    assert "autoencoder=runs/.." in said
    assert "Traceback" not in said


def autoencoder_run(folder, val):
    """A run of stage=autoencoder whose configuration says so of its validation pictures."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=["name=x"]), resolve=True)
    trained = instantiate(cfg["autoencoder"])
    cfg["data"] |= {"val": val, "size": 16}
    (folder / "config.yaml").parent.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    state = {f"autoencoder.{name}": value for name, value in trained.state_dict().items()}
    facts = {"stage": "autoencoder", "config": "", "frozen": {}}
    payload = {"state_dict": state, "global_step": 1, "ldm": facts}
    write_checkpoint(payload, folder / "checkpoints" / "step=00000001.ckpt")
    return folder


def test_the_pictures_that_a_run_names_are_looked_at_and_nothing_is_written(tmp_path):
    pictures = write_shapes(tmp_path / "mine" / "val", range(2))
    run_dir = autoencoder_run(tmp_path / "run", ["scenes", str(pictures)])
    figures = package_autoencoder(run_dir, tmp_path / "out", scenes=2)
    assert figures["psnr_mine_db"] > 10
    assert [path.name for path in pictures.iterdir()] == ["00000.tar"]


def test_no_server_that_a_run_names_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ldm.data.shards.locations.describe_urls", lambda urls: pytest.fail(f"{urls} were asked")
    )
    run_dir = autoencoder_run(tmp_path / "run", ["scenes", "http://127.0.0.1:9/a.tar"])
    with pytest.raises(UsageError, match="is on a server"):
        package_autoencoder(run_dir, tmp_path / "out", scenes=2)
    assert not (tmp_path / "out").exists()


ODD = {
    "a pipe": ("result.json", None, "is no file"),
    "nothing of images": ("result.json", '{"steps": 1}', "does not say how it was trained"),
    "aliases": (".hydra/overrides.yaml", "- &a [x]\n- *a", "alias"),
    "no words": (".hydra/overrides.yaml", "- {a: b}", "is no list of words"),
    "a pipe of settings": ("config.yaml", None, "is no file"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_run_that_does_not_say_how_it_was_trained_is_no_part(tmp_path, case):
    name, text, said = ODD[case]
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "result.json").write_text('{"steps": 1, "images_seen": 4, "seconds": 60}')
    (tmp_path / ".hydra/overrides.yaml").write_text("- seed=3\n")
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert "`python train.py seed=3` (seed 3)" in describe_training("clip", tmp_path)
    if text is None:
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        describe_training("clip", tmp_path)
