"""Folders with damaged or hostile files: one line names the file or the key, and nothing runs."""

import json
import shutil

import published_folders as folders
import pytest

from ldm.config.published import open_checkpoint, open_published
from ldm.utils.errors import UsageError

INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
NAN = float("nan")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return folders.write_sd1(tmp_path_factory.mktemp("published") / "sd1")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "sd1")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", [INDEX, UNET, VAE, SCHEDULER])
@pytest.mark.parametrize("text", ["{", "[1]", "null", '"x"', ""])
def test_a_file_that_is_no_mapping_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(UsageError, match=f"{name} is no (JSON|mapping)"):
        open_published(str(folder))


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        (INDEX, {"_class_name": ["pipeline", "Mine"]}, r"it is a \['pipeline', 'Mine'\]"),
        (INDEX, {"unet": ["my_unet", "UNet2DConditionModel"]}, "unet is of my_unet, and such code"),
        (INDEX, {"unet": ["diffusers", {}]}, "not a library and a class"),
        (INDEX, {"unet": ["UNet2DConditionModel"]}, "not a library and a class"),
        (INDEX, {"unet": ["diffusers", "UNet2DConditionModel", 1]}, "not a library and a class"),
        (INDEX, {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer is a T5Tokenizer"),
        (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderTiny in"),
        (INDEX, {"scheduler": ["diffusers", "FooScheduler"]}, "FooScheduler, which is none of"),
        (INDEX, {"": 1}, "which is not read here"),
        (UNET, {"block_out_channels": [10**9, 10**9]}, "block_out_channels=1000000000"),
        (UNET, {"layers_per_block": 10**6}, "layers_per_block=1000000"),
        (UNET, {"transformer_layers_per_block": 10**5}, "transformer_layers_per_block=100000"),
        (UNET, {"sample_size": 10**9}, "sample_size=1000000000"),
        (UNET, {"sample_size": 0}, "sample_size=0"),
        (UNET, {"sample_size": []}, r"sample_size=\[\]"),
        (UNET, {"sample_size": [8, 16]}, r"sample_size=\[8, 16\]"),
        (VAE, {"layers_per_block": 10**6}, "layers_per_block=1000000"),
        (SCHEDULER, {"beta_start": NAN}, "beta_start=nan"),
        (SCHEDULER, {"beta_start": "0.1"}, "beta_start='0.1'"),
        (SCHEDULER, {"beta_end": 2}, "scheduler_config.json: betas must be one row"),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000"),
        (SCHEDULER, {"num_train_timesteps": []}, r"num_train_timesteps=\[\]"),
        (SCHEDULER, {"trained_betas": 0.5}, "trained_betas are no list of numbers"),
        (SCHEDULER, {"trained_betas": [0.1]}, "1 trained_betas do not fit"),
        (SCHEDULER, {"trained_betas": [2.0] * 1000}, "scheduler_config.json: betas must be"),
        (SCHEDULER, {"beta_schedule": {}}, "beta_schedule={}"),
    ],
)
def test_a_value_that_cannot_be_is_named(folder, name, values, what):
    change(folder / name, **values)
    with pytest.raises(UsageError, match=what):
        open_published(str(folder))


def test_a_scheduler_is_of_the_class_in_the_index(folder):
    change(folder / INDEX, scheduler=["diffusers", "DDIMScheduler"])  # diffusers builds this one
    assert open_published(str(folder)).sampler._target_.endswith("DDIMSampler")


def test_no_text_of_xl_is_zeros_or_it_is_not(tmp_path):
    folder = folders.write_sdxl(tmp_path / "sdxl")
    change(folder / INDEX, force_zeros_for_empty_prompt="yes")
    with pytest.raises(UsageError, match="force_zeros_for_empty_prompt=yes is neither"):
        open_published(str(folder))


def test_a_folder_of_one_part_or_without_index_says_what_to_give(folder):
    for part in ("vae", "unet", "text_encoder"):
        with pytest.raises(UsageError, match=f"{part} is one network, and no pipeline"):
            open_checkpoint(str(folder / part))
    (folder / INDEX).unlink()
    with pytest.raises(UsageError, match=f"has no {INDEX}: copy it"):
        open_checkpoint(str(folder))
