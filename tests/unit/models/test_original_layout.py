"""One file in the original layout against what diffusers makes of it."""

import json

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from original_files import (
    add_tower,
    collect_original_state,
    make_pipeline,
    to_clip,
    to_open_clip,
    to_original_autoencoder,
    to_original_unet,
    write_original_file,
)
from published_sizes import PUBLISHED_UNETS
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.diffusion.conditioning import Condition
from ldm.models.diffusers_format import (
    load_unet,
    make_autoencoder_kl,
    read_autoencoder_settings,
    read_unet_settings,
)
from ldm.models.original_configs import (
    derive_autoencoder_config,
    derive_text_config,
    derive_unet_config,
)
from ldm.models.original_layout import open_original_file
from ldm.models.original_names import (
    convert_open_clip,
    convert_original_autoencoder,
    convert_original_clip,
    convert_original_unet,
)
from ldm.models.text.clip import ClipTextEncoder
from ldm.models.unet import UNet
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError

KINDS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(kind):
    torch.manual_seed(0)
    return make_pipeline(kind, prediction="v_prediction" if kind == "sd2" else "epsilon")


@pytest.fixture(scope="module")
def file(pipeline, kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind) / "model.safetensors"
    return write_original_file(collect_original_state(pipeline), path)


@pytest.fixture(scope="module")
def folder(file):
    return open_original_file(file, cache=file.parent / "cache")


def read_weights(folder):
    """The weights of a part; transformers since 5.6 leaves out the name of CLIP's tower."""
    [path] = folder.glob("*.safetensors")
    return {name.removeprefix("text_model."): value for name, value in load_file(path).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def paint(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "output_type": "pt", "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(1)
    return pipeline("a red circle", guidance_scale=4.0, generator=generator, **how).images


def test_each_part_has_the_weights_of_the_pipeline(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    names = sorted(path.parent.name for path in tmp_path.glob("*/*.safetensors"))
    assert names == sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    for name in names:
        assert_equal(read_weights(folder / name), read_weights(tmp_path / name))


def test_diffusers_converts_the_file_to_the_same_weights(file, folder):
    state, config = load_file(file), json.loads((folder / "unet/config.json").read_text())
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(state), config)
    assert_equal(read_weights(folder / "unet"), theirs)
    config = json.loads((folder / "vae/config.json").read_text())
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(state), config)
    assert_equal(read_weights(folder / "vae"), theirs)


def test_diffusers_opens_the_folder_and_paints_the_same_picture(pipeline, folder):
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(theirs) is type(pipeline)
    assert type(theirs.scheduler) is type(pipeline.scheduler)
    torch.testing.assert_close(paint(theirs), paint(pipeline), rtol=0, atol=1e-5)


def test_diffusers_paints_the_same_picture_from_the_file(pipeline, kind, file, folder):
    cls = type(pipeline)
    theirs = cls.from_single_file(str(file), config=str(folder), local_files_only=True)
    torch.testing.assert_close(paint(theirs), paint(pipeline), rtol=0, atol=1e-5)


@torch.no_grad()
def test_our_networks_give_what_those_of_diffusers_give(pipeline, kind, folder):
    config = json.loads((folder / "unet/config.json").read_text())
    unet = UNet(**read_unet_settings(config))
    load_unet(unet, folder / "unet")
    x, t, tokens = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, unet.context_dim)
    pooled, sizes = torch.randn(1, 48), torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    more = {"text_embeds": pooled, "time_ids": sizes} if kind == "sdxl" else None
    theirs = pipeline.unet(x, t, tokens, added_cond_kwargs=more).sample
    cond = Condition(tokens, pooled=pooled, sizes=sizes) if more else Condition(tokens)
    torch.testing.assert_close(unet(x, t, cond), theirs, rtol=1e-4, atol=1e-5)
    config = json.loads((folder / "vae/config.json").read_text())
    settings = read_autoencoder_settings(config)
    autoencoder = make_autoencoder_kl(path=str(folder / "vae"), **settings)
    theirs = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(autoencoder.decode(x), theirs, rtol=1e-4, atol=1e-5)


def test_our_text_encoder_reads_the_tokens_that_diffusers_reads(pipeline, folder):
    ours, texts = ClipTextEncoder(str(folder)), ["a red circle", ""]
    how = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    ids = pipeline.tokenizer(texts, **how).input_ids
    assert torch.equal(ours.tokenize(texts), ids)
    states = pipeline.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(ours(texts).tokens, states, rtol=0, atol=1e-5)


def test_a_pickled_file_gives_the_same_folder(file, folder):
    path = write_original_file(load_file(file), file.with_name("pickled.ckpt"), global_step=3)
    other = open_original_file(path, cache=folder.parents[1])
    assert other != folder
    for part in folder.glob("*/*.safetensors"):
        assert (other / part.relative_to(folder)).read_bytes() == part.read_bytes()


def test_a_file_is_converted_once(file, folder):
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert open_original_file(file, cache=folder.parents[1]) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before


def test_half_precision_stays_half(file, folder):
    state = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
    path = write_original_file(state, file.with_name("half.safetensors"))
    half = read_weights(open_original_file(path, cache=folder.parents[1]) / "unet")
    assert_equal(half, {name: t.half() for name, t in read_weights(folder / "unet").items()})


def test_an_inpainting_file_is_of_nine_channels(tmp_path):
    state = collect_original_state(make_pipeline("sd1", channels=9))
    path = write_original_file(state, tmp_path / "model.safetensors")
    folder = open_original_file(path, cache=tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(theirs) is diffusers.StableDiffusionInpaintPipeline
    assert theirs.unet.config.in_channels == 9


def test_averaged_weights_are_used_and_a_line_says_so(tmp_path, caplog):
    state = collect_original_state(make_pipeline("sd1"), averaged=True)
    path = write_original_file(state, tmp_path / "model.safetensors")
    for _ in range(2):  # the second time without a conversion
        caplog.clear()
        folder = open_original_file(path, cache=tmp_path)
        assert "its averaged weights (model_ema) are used" in caplog.text
    config = json.loads((folder / "unet/config.json").read_text())
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(state), config, extract_ema=True)
    assert_equal(read_weights(folder / "unet"), theirs)


def test_what_is_not_used_is_named(tmp_path, caplog):
    state = collect_original_state(make_pipeline("sd1"))
    state |= {"betas": torch.zeros(1000), "safety.head.weight": torch.zeros(1)}
    path = write_original_file(state, tmp_path / "model.safetensors")
    open_original_file(path, cache=tmp_path)
    assert "what else it holds is not used: safety.head" in caplog.text
    assert "betas" not in caplog.text


def test_a_network_of_other_blocks_is_refused_by_the_name_that_it_lacks(tmp_path):
    state = collect_original_state(make_pipeline("sd1"))
    state = {name: value for name, value in state.items() if ".middle_block.1." not in name}
    path = write_original_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it has no 'mid_block.attentions.0"):
        open_original_file(path, cache=tmp_path)
    state["model.diffusion_model.adapter.weight"] = torch.zeros(1)
    path = write_original_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter.weight is of no UNet that is known here"):
        open_original_file(path, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("input_blocks.0.0.weight", torch.ones(3), "or damaged: tuple index out of range"),
        ("middle_block.1.transformer_blocks.0.attn2.to_k.weight", torch.ones(3), "or damaged"),
        ("out.2.bias", torch.full((4,), torch.nan), "out.2.bias is not finite"),
    ],
)
def test_a_damaged_file_leaves_no_folder(tmp_path, name, value, what):
    state = collect_original_state(make_pipeline("sd1")) | {f"model.diffusion_model.{name}": value}
    path = write_original_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors .*{what}"):
        open_original_file(path, cache=tmp_path / "cache")
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_a_tokenizer_that_is_nowhere_is_named_with_the_remedy(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "model.safetensors"
    path.symlink_to(file)
    wanted = (
        r"holds no tokenizer, and openai/clip-vit-large-patch14 .*vocab.json and merges.txt, into"
    )
    with pytest.raises(UsageError, match=wanted):
        open_original_file(path, cache=tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer: put CLIP's"):
        open_original_file(path, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "pooled"), [("sd1", 0), ("sd1-inpainting", 0), ("sd2", 0), ("sdxl", 1280)]
)
def test_the_published_networks_are_known_by_their_shapes(name, pooled):
    config = PUBLISHED_UNETS[name]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    state = convert_original_unet(to_original_unet(theirs))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == shapes
    kind, side = name.partition("-")[0], config["sample_size"]
    derived = derive_unet_config(state, kind=kind, pooled=pooled, sample_size=side)
    assert read_unet_settings(derived) == read_unet_settings(config)


@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ((768, 12, 3072, None), "quick_gelu"),  # CLIP ViT-L/14
        ((1024, 23, 4096, None), "gelu"),  # OpenCLIP ViT-H/14 without its last layer
        ((1280, 32, 5120, 1280), "gelu"),  # OpenCLIP ViT-bigG/14
    ],
)
def test_the_published_text_encoders_are_known_by_their_shapes(sizes, activation):
    width, layers, inner, projection = sizes
    more = {"projection_dim": projection} if projection else {}
    config = CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=width // 64,
        hidden_act=activation,
        **more,
    )
    with torch.device("meta"):
        theirs = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    if activation == "gelu":
        last = None if projection else 23
        state = convert_open_clip(
            to_open_clip(theirs, more_layers=0 if projection else 1),
            layers=last,
            projected=projection is not None,
        )
    else:
        state = convert_original_clip(to_clip(theirs))
    shapes = {add_tower(key): value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == shapes
    derived = derive_text_config(state, activation=activation)
    wanted = config.to_dict()
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    for key in (*sizes, "vocab_size", "max_position_embeddings", "hidden_act"):
        assert derived[key] == wanted[key]
    assert derived["projection_dim"] == (projection or width)


def test_the_published_autoencoder_is_known_by_its_shapes():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
    state = convert_original_autoencoder(to_original_autoencoder(theirs))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == shapes
    derived = derive_autoencoder_config(state, kind="sd1", sample_size=512)
    for key in ("block_out_channels", "layers_per_block", "latent_channels"):
        assert derived[key] == (
            list(theirs.config[key]) if key == "block_out_channels" else theirs.config[key]
        )
