"""Networks in the arrangements of published ones, written by diffusers with random weights."""

import inspect
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from published_sizes import PUBLISHED_AUTOENCODERS, PUBLISHED_UNETS, SMALL_UNETS
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusers_config import (
    AUTOENCODER_DEFAULTS,
    HARMLESS_AUTOENCODER_KEYS,
    HARMLESS_KEYS,
    UNET_DEFAULTS,
)
from ldm.models.diffusers_format import load_unet, read_unet_state, save_unet
from ldm.models.diffusers_names import from_diffusers, to_diffusers
from ldm.models.diffusers_settings import (
    export_unet_config,
    read_autoencoder_settings,
    read_unet_settings,
)
from ldm.models.unet import UNet


def make_oracle(kind: str) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SMALL_UNETS[kind]).double().eval()


def make_sdxl() -> UNet:
    ours = UNet(**read_unet_settings(SMALL_UNETS["sdxl"])).double().eval()
    ours.load_state_dict(from_diffusers(make_oracle("sdxl").state_dict()))
    return ours


def make_inputs(net: UNet) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    x = torch.randn(2, net.in_channels, 8, 16, dtype=torch.float64)
    tokens = torch.randn(2, 7, net.context_dim, dtype=torch.float64)
    pooled = torch.randn(2, net.pooled_dim, dtype=torch.float64) if net.pooled_dim else None
    sizes = torch.tensor([[512, 768, 0, 3, 640, 640], [64, 80, 1, 0, 1024, 333]])
    return x, torch.tensor([10, 901]), Condition(tokens, pooled=pooled, sizes=sizes)


def run_oracle(
    oracle: diffusers.UNet2DConditionModel, x: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    added = {"text_embeds": cond.pooled, "time_ids": cond.sizes}
    return oracle(
        x, t, cond.tokens, class_labels=cond.pooled, added_cond_kwargs=added, return_dict=False
    )[0]


@pytest.mark.parametrize("kind", SMALL_UNETS)
@torch.no_grad()
def test_a_folder_of_diffusers_is_the_same_network(kind, tmp_path):
    oracle = make_oracle(kind)
    oracle.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours = UNet(**read_unet_settings(config)).double().eval()
    load_unet(ours, tmp_path / "theirs")
    x, t, cond = make_inputs(ours)
    expected = run_oracle(oracle, x, t, cond)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SMALL_UNETS)
def test_weights_are_the_same_bits_after_the_way_out_and_in(kind, tmp_path):
    oracle = make_oracle(kind)
    oracle.save_pretrained(tmp_path / "theirs")
    ours = UNet(**read_unet_settings(dict(oracle.config))).double()
    load_unet(ours, tmp_path / "theirs")
    save_unet(ours, tmp_path / "ours", dtype=torch.float64, sample_size=16)
    again = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "ours", torch_dtype=torch.float64
    )
    assert_same_tensors(again.state_dict(), oracle.state_dict())
    assert_same_tensors(read_unet_state(tmp_path / "ours"), ours.state_dict())
    assert again.config.sample_size == 16
    assert read_unet_settings(again.config) == read_unet_settings(oracle.config)
    # Nothing is dropped: what diffusers opens has the arguments of what it wrote.
    config = {key: as_list(value) for key, value in again.config.items()}
    theirs = {key: as_list(value) for key, value in oracle.config.items() if key[0] != "_"}
    differ = {key for key, value in theirs.items() if config[key] != value}
    assert differ <= {"sample_size", "upcast_attention"}


def as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_in_parts_and_in_half_precision_are_read(tmp_path):
    oracle = make_oracle("sd2").float()
    oracle.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert (tmp_path / "parts/diffusion_pytorch_model.safetensors.index.json").is_file()
    oracle.save_pretrained(tmp_path / "half", variant="fp16")
    oracle.save_pretrained(tmp_path / "whole")
    expected = read_unet_state(tmp_path / "whole")
    assert_same_tensors(read_unet_state(tmp_path / "parts"), expected)
    assert_same_tensors(read_unet_state(tmp_path / "half"), expected)


@torch.no_grad()
def test_sizes_that_are_not_given_are_those_of_the_picture():
    ours = make_sdxl()
    x, t, cond = make_inputs(ours)
    given = replace(cond, sizes=torch.tensor([[64, 128, 0, 0, 64, 128]] * 2))
    out = ours(x, t, replace(cond, sizes=None))
    assert torch.equal(out, ours(x, t, given))
    assert not torch.equal(out, ours(x, t, cond))
    with pytest.raises(ValueError, match=r"needs cond.sizes for 2 images, 6 wide, got .*\(2, 5\)"):
        ours(x, t, replace(cond, sizes=cond.sizes[:, :5]))


@torch.no_grad()
def test_copies_of_guidance_and_projected_texts_change_nothing_with_sizes():
    ours = make_sdxl()
    x, _, cond = make_inputs(ours)
    x, t = torch.cat([x[:1]] * 2), torch.tensor(423.0)
    plain = ours(x, t, cond)
    shared = replace(cond, copies=2, projected=ours.project_text(cond.tokens))
    torch.testing.assert_close(ours(x, t, shared), plain, rtol=1e-10, atol=1e-12)
    assert not torch.equal(plain[0], plain[1])


def test_defaults_are_those_of_diffusers():
    for kind, ours, harmless in (
        (diffusers.UNet2DConditionModel, UNET_DEFAULTS, HARMLESS_KEYS),
        (diffusers.AutoencoderKL, AUTOENCODER_DEFAULTS, HARMLESS_AUTOENCODER_KEYS),
    ):
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        theirs = {each.name: as_list(each.default) for each in parameters}
        assert ours == {name: value for name, value in theirs.items() if name not in harmless}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2"),
        ({"downsample_padding": 0}, "downsample_padding=0"),
        ({"only_cross_attention": [True, False]}, r"only_cross_attention=\[True, False\]"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"num_class_embeds": 1000}, r"num_class_embeds=1000 \(.* as in the x4 upscaler\)"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"addition_embed_type": "text"}, "addition_embed_type=text"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 .*latent consistency"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type=UNetMid"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types=.*AttnDown"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types="),
        ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\]"),
        ({"cross_attention_dim": [8, 16]}, "cross_attention_dim="),
        ({"transformer_layers_per_block": [[1, 2], 1]}, "transformer_layers_per_block="),
        ({"attention_head_dim": None}, "attention_head_dim=None"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"dropout": 2}, "dropout=2"),
        ({"projection_class_embeddings_input_dim": 8}, "projection_class_embeddings_input_dim=8"),
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift=ada_group"),
        ({"_class_name": "UNet3DConditionModel"}, "_class_name=UNet3DConditionModel"),
        ({"new_in_2027": False, "freq_shift": 1}, "freq_shift=1, new_in_2027=False"),
        ({"block_out_channels": "320"}, "block_out_channels=320"),
        ({"down_block_types": None}, "down_block_types=None"),
    ],
    ids=str,
)
def test_what_our_network_cannot_be_is_refused_by_name(changes, message):
    config = SMALL_UNETS["sd1"] | changes
    with pytest.raises(
        ValueError, match=f"of no UNet2DConditionModel that ldm can hold: .*{message}"
    ):
        read_unet_settings(config)


def test_settings_at_their_defaults_and_notes_are_no_matter():
    config = SMALL_UNETS["sd1"]
    full = {**UNET_DEFAULTS, **config, "_class_name": "UNet2DConditionModel", "sample_size": 64}
    full |= {"_diffusers_version": "0.2.1", "_name_or_path": "x", "upcast_attention": True}
    full |= {"only_cross_attention": [False, False], "layers_per_block": [1, 1], "act_fn": "swish"}
    full["time_embedding_dim"] = 4 * config["block_out_channels"][0]
    assert read_unet_settings(full) == read_unet_settings(config)
    heads = read_unet_settings(config | {"num_attention_heads": [4, 2], "attention_head_dim": 8})
    assert heads["heads"] == [4, 2]
    assert read_unet_settings({})["heads"] == 8
    assert read_unet_settings({})["context_dim"] == 1280


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED_UNETS)
def test_full_shapes_have_the_names_and_shapes_of_diffusers(kind):
    config = PUBLISHED_UNETS[kind]
    with torch.device("meta"):
        oracle = diffusers.UNet2DConditionModel(**config)
        ours = UNet(**read_unet_settings(oracle.config))
    sizes, linear = ours.size_embedding > 0, ours.linear_projections
    state = to_diffusers(ours.state_dict(), sizes=sizes, linear=linear)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}
    exported = export_unet_config(ours)
    assert all(as_list(oracle.config[key]) == value for key, value in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED_AUTOENCODERS)
def test_full_autoencoders_have_the_names_and_shapes_of_diffusers(kind):
    with torch.device("meta"):
        oracle = diffusers.AutoencoderKL(**PUBLISHED_AUTOENCODERS[kind])
        ours = AutoencoderKL(**read_autoencoder_settings(oracle.config))
    shapes = {name: tensor.shape for name, tensor in to_diffusers(ours.state_dict()).items()}
    assert shapes == {name: tensor.shape for name, tensor in oracle.state_dict().items()}


@pytest.mark.slow
@torch.no_grad()
def test_stable_diffusion_2_at_full_size_is_the_same_network():
    """The weights (3.5 GB) are there once: diffusers' network takes our tensors."""
    with torch.device("meta"):
        ours = UNet(**read_unet_settings(PUBLISHED_UNETS["sd2"]))
        oracle = diffusers.UNet2DConditionModel(**export_unet_config(ours))
    ours.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for parameter in ours.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.uniform_(-1, 1).mul_((3 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.1)
        if parameter.ndim == 1:
            parameter.add_(0.5)
    oracle.load_state_dict(to_diffusers(ours.state_dict(), linear=True), assign=True)
    x, t, tokens = torch.randn(1, 4, 8, 16), torch.tensor([421]), torch.randn(1, 77, 1024)
    expected = oracle.eval()(x, t, tokens, return_dict=False)[0]
    assert expected.std() > 0.01
    difference = (ours(x, t, Condition(tokens)) - expected).abs().max()
    assert difference < 1e-4 * expected.abs().max()
