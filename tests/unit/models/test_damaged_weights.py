"""Damaged or hostile files of weights in folders: one line names the file, and nothing runs."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ldm.models.diffusers_files import find_diffusers_weights, read_diffusers_weights

NAME = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "index.json is no JSON"),
        ("[" * 100_000, "index.json is nested too deep"),
        ("[]", "index.json is no mapping"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "files of other folders"),
        ('{"weight_map": {"a": "/outside.safetensors"}}', "files of other folders"),
        ('{"weight_map": {"a": "."}}', "files of other folders"),
        (json.dumps({"weight_map": {"a": f"{NAME}.safetensors.index.json"}}), "none of weights"),
        ('{"weight_map": {"a": "1-of-2.safetensors"}}', "names 1-of-2.safetensors, not there"),
    ],
)
def test_an_index_that_names_no_files_next_to_it_is_refused(tmp_path, text, what):
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / f"{NAME}.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        read_diffusers_weights(find_diffusers_weights(folder))


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"a": Code()}, "holds code in place of weights"),
        ([1, 2], "other things, than tensors by name"),
        (3, "other things, than tensors by name"),
        ({"state_dict": {"a": torch.ones(1)}}, "other things, than tensors by name"),
        ({1: torch.ones(1)}, "other things, than tensors by name"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a is not finite"),
    ],
)
def test_a_pickle_that_is_no_mapping_of_tensors_is_refused(tmp_path, monkeypatch, value, what):
    monkeypatch.chdir(tmp_path)
    torch.save(value, tmp_path / f"{NAME}.bin")
    with pytest.raises(ValueError, match=what):
        read_diffusers_weights(find_diffusers_weights(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, bad):
    weights = {"fine": torch.ones(3, dtype=dtype), "bad": torch.tensor([float(bad)], dtype=dtype)}
    save_file(weights, tmp_path / f"{NAME}.safetensors")
    with pytest.raises(ValueError, match=f"{NAME}.safetensors: bad is not finite"):
        read_diffusers_weights(find_diffusers_weights(tmp_path))


@pytest.mark.parametrize(
    ("text", "what"), [("null", "no mapping"), ("[" * 100_000, "nested too deep"), (None, "has no")]
)
def test_a_text_encoder_names_its_damaged_config(tmp_path, text, what):
    from ldm.models.text.clip import ClipTextEncoder

    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=what):
        ClipTextEncoder(str(tmp_path))


@pytest.mark.parametrize("value", [{"a": Code()}, [1, 2], 3, {1: torch.ones(1)}])
def test_a_text_encoder_s_pickle_that_is_no_mapping_of_tensors_is_refused(
    tmp_path, monkeypatch, value
):
    from ldm.models.text.clip import ClipTextEncoder

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": 1}))
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="hold more than tensors by name, which could run code"):
        ClipTextEncoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"hidden_size": 10**9}, "hidden_size=1000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"num_attention_heads": -1}, "num_attention_heads=-1"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"hidden_act": "evil"}, "hidden_act='evil'"),
        ({"eos_token_id": [1]}, r"eos_token_id=\[1\]"),
    ],
)
def test_a_value_that_no_text_encoder_has_is_named(tmp_path, values, what):
    from ldm.models.text.clip import ClipTextEncoder

    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"config.json .* is of no CLIPTextModel: it has {what}"):
        ClipTextEncoder(str(tmp_path))


@pytest.mark.parametrize("data", [b"{", b"\xff\x00"])
def test_a_damaged_tokenizer_is_named(tmp_path, data):
    import published_folders as folders
    from transformers import CLIPTextModel

    from ldm.models.text.clip import ClipTextEncoder

    tokenizer = folders.make_tokenizer()
    folders.text_tower(CLIPTextModel, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"the tokenizer in '{tmp_path}' is damaged"):
        ClipTextEncoder(str(tmp_path))


@pytest.mark.parametrize(
    "values",
    [
        {"scaling_factor": 0},
        {"scaling_factor": "x"},
        {"scaling_factor": None},
        {"shift_factor": float("nan")},
        {"latents_mean": [1]},
        {"latents_std": [0, 1, 1, 1]},
        {"latents_std": 0},
        {"patch_size": -1},
    ],
)
def test_a_latent_scale_that_cannot_be_is_named(values):
    from ldm.models.diffusers_format import read_autoencoder_settings

    with pytest.raises(ValueError, match=f"{min(values)}="):
        read_autoencoder_settings(values)


@pytest.mark.parametrize(
    "values",
    [
        {"scaling_factor": float("nan")},
        {"scaling_factor": 0},
        {"scaling_factor": "x"},
        {"shift_factor": float("nan")},
        {"latent_channels": 10**9},
        {"latent_channels": -1},
        {"num_encoder_blocks": [1, 10**7]},
        {"encoder_block_out_channels": 3},
        {"act_fn": "evil"},
    ],
)
def test_a_damaged_config_of_a_tiny_autoencoder_is_named(tmp_path, values):
    from diffusers import AutoencoderTiny

    from ldm.models.diffusers_autoencoder import DiffusersAutoencoder

    sizes = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
    sizes |= {f"num_{half}_blocks": (1, 1) for half in ("encoder", "decoder")}
    AutoencoderTiny(**sizes).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ValueError, match=f"{file} "):
        DiffusersAutoencoder(str(tmp_path))
