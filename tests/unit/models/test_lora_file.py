"""LoRA files: ours in diffusers, and those of others here."""

import copy
import hashlib
import json

import diffusers
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from published_folders import make_tokenizer, text_tower
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import ALPHA, FACTS, RANK, SIZES, call, randomize
from torch import nn
from transformers import CLIPTextModel

from ldm.diffusion.conditioning import Condition
from ldm.models.diffusers_format import export_unet_config, to_diffusers
from ldm.models.lora import add_lora_layers
from ldm.models.lora_file import add_lora_file, save_lora, to_original_name
from ldm.models.original_names import convert_original_unet
from ldm.models.text.clip import ClipTextEncoder
from ldm.models.unet import UNet
from ldm.utils.errors import UsageError
from ldm.utils.lora_weights import merge_adapters


@pytest.fixture
def base() -> UNet:
    network = UNet(**SIZES)
    randomize(network)
    return network.double()


@pytest.fixture(params=["attention", "all"])
def adapted(base, request) -> UNet:
    torch.manual_seed(0)
    network = copy.deepcopy(base)
    add_lora_layers(network, rank=RANK, alpha=ALPHA, targets=request.param)
    for name, weight in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return network


@pytest.fixture
def file(adapted, tmp_path):
    path = tmp_path / "lora.safetensors"
    facts = {"title": "a style", "size": 64, "kind": "eps"}
    save_lora(adapted.state_dict(), path, scale=ALPHA / RANK, **facts)
    return path


def with_file(base: UNet, *files, **how) -> UNet:
    network = copy.deepcopy(base)
    for file in files:
        add_lora_file(network, nn.Identity(), file, **how)
    return network


def diffusers_unet(base: UNet):
    theirs = diffusers.UNet2DConditionModel(**export_unet_config(base)).double()
    theirs.load_state_dict(to_diffusers(base.state_dict()))
    return theirs


@torch.no_grad()
def call_theirs(theirs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    x, tokens = torch.randn(2, 4, 8, 8, **draw), torch.randn(2, 5, 12, **draw)
    return theirs(x, torch.tensor([10.0, 900.0]), tokens).sample


def test_our_file_is_ours_again(base, adapted, file):
    merged = UNet(**SIZES).double()
    merged.load_state_dict(merge_adapters(adapted.state_dict(), FACTS))
    torch.testing.assert_close(call(with_file(base, file)), call(merged), rtol=1e-5, atol=1e-5)


def test_our_file_does_the_same_in_diffusers(base, adapted, file):
    theirs = diffusers_unet(base)
    before = call_theirs(theirs)
    theirs.load_lora_adapter(load_file(file), prefix="unet")
    after = call_theirs(theirs.double())
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(call(adapted), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 8])
@torch.no_grad()
def test_adapters_of_pooled_text_do_the_same_in_diffusers(tmp_path, size):
    """Without sizes as Stable Diffusion 2 has it, with them as SDXL has it."""
    base = UNet(**SIZES, pooled_dim=6, size_embedding=size).double()
    randomize(base)
    adapted, path = copy.deepcopy(base), tmp_path / "lora.safetensors"
    add_lora_layers(adapted, rank=RANK, alpha=ALPHA, targets=["pooled_mlp.*", "time_mlp.*"])
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    facts = {"title": "a style", "size": 64, "kind": "eps", "sizes": size > 0}
    save_lora(adapted.state_dict(), path, scale=ALPHA / RANK, **facts)
    theirs = diffusers.UNet2DConditionModel(**export_unet_config(base)).double()
    theirs.load_state_dict(to_diffusers(base.state_dict(), sizes=size > 0))
    theirs.load_lora_adapter(load_file(path), prefix="unet")
    x, tokens = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 12).double()
    t, pooled, sizes = torch.tensor([10.0, 900.0]), torch.randn(2, 6).double(), torch.rand(2, 6)
    how = {"class_labels": pooled}
    if size:
        how = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    expected = theirs.double()(x, t, tokens, **how).sample
    for network in (adapted, with_file(base, path)):
        out = network(x, t, Condition(tokens, pooled=pooled, sizes=sizes if size else None))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    former = {name.replace("add_emb", "class_emb"): t for name, t in load_file(path).items()}
    save_file(former, path)
    again = with_file(base, path)(x, t, Condition(tokens, pooled=pooled, sizes=sizes))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_the_file_says_what_it_is(file):
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["modelspec.sai_model_spec"] == "1.0.0"
    assert facts["modelspec.architecture"] == "ldm-unet/lora"
    assert facts["modelspec.title"] == "a style"
    assert facts["modelspec.resolution"] == "64x64"
    assert facts["modelspec.prediction_type"] == "epsilon"
    assert facts["modelspec.date"].endswith("Z")
    data = file.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert facts["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"


def test_files_of_others_do_here_what_they_do_there(base, adapted, file, tmp_path):
    """diffusers' own with alpha in its metadata, and kohya's."""
    theirs = diffusers_unet(base)
    theirs.load_lora_adapter(load_file(file), prefix="unet")
    settings = {"lora_alpha": 6, "r": RANK, "use_dora": False}
    tensors = {name.removeprefix("unet."): t for name, t in load_file(file).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", tensors, unet_lora_adapter_metadata=settings
    )
    kohya = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in tensors.items()})
    kohya = {name: t * 2 if name.endswith(".alpha") else t for name, t in kohya.items()}
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert any(name.startswith("lora_unet_") for name in kohya)
    expected = call(with_file(base, file, file))  # alpha is twice the rank
    for path in (
        tmp_path / "theirs" / "pytorch_lora_weights.safetensors",
        tmp_path / "kohya.safetensors",
    ):
        torch.testing.assert_close(call(with_file(base, path)), expected, rtol=1e-5, atol=1e-5)


def test_several_files_with_weights_add_up(base, file):
    both, none = with_file(base, file), with_file(base, file)
    add_lora_file(both, nn.Identity(), file, weight=0.5)
    add_lora_file(none, nn.Identity(), file, weight=-1.0)
    once = with_file(base, file, weight=1.5)
    torch.testing.assert_close(call(both), call(once), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call(none), call(base), rtol=1e-5, atol=1e-5)


def name_part(tensors, suffix):
    """The name of another part of the first adapter."""
    return f"{min(tensors).partition('.lora_')[0]}.{suffix}"


def change_file(file, change) -> None:
    tensors = load_file(file)
    tensors |= {} if (more := change(tensors)) is None else more
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {
                "unet.mid_block.odd.lora_A.weight": t.pop(min(t)),
                "unet.mid_block.odd.lora_B.weight": t.pop(min(t)),
            },
            "unet.mid_block.odd is no layer here",
        ),
        (lambda t: t.update({n: torch.ones(RANK, 99) for n in [min(t)]}), "there and"),
        (lambda t: t.update({n: torch.ones(2, 32) for n in [min(t)]}), "rank 2 down and 3 up"),
        (lambda t: t.update({n: v * torch.inf for n, v in t.items()}), "is not finite"),
        (lambda t: {} if t.pop(min(t)).numel() else None, "is not whole"),
        (
            lambda t: {
                "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 2),
                "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 1),
            },
            "lora_te_text_model_encoder_layers_0_mlp_fc1 is no layer here",
        ),
        (lambda t: {"lora_unet_mid.hada_w1_a": torch.ones(1)}, "lora_unet_mid.hada_w1_a"),
        (lambda t: t.clear(), "holds nothing"),
        (lambda t: t.update({n: v[:0] for n, v in t.items() if "lora_A" in n}), "of rank 1 or"),
        (lambda t: t.update({n: v[0].clone() for n, v in t.items()}), "are matrices of floats"),
        (lambda t: t.update({n: v > 0 for n, v in t.items()}), "are matrices of floats"),
        (lambda t: {name_part(t, "alpha"): torch.ones(3)}, "has 3 numbers, where an alpha is one"),
        (lambda t: {name_part(t, "lora.down.weight"): t[min(t)].clone()}, "is there twice"),
    ],
)
def test_other_files_are_refused_by_name(base, file, change, said):
    before = base.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    change_file(file, change)
    with pytest.raises(UsageError, match=said):
        add_lora_file(base, nn.Identity(), file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_file_without_tensors_and_another_kind_of_adapter_are_refused(base, file, tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UsageError, match=r"no whole \.safetensors file"):
        add_lora_file(base, nn.Identity(), tmp_path / "text")
    odd = json.dumps({"unet.lora_alpha": "8"})
    others = {json.dumps({"unet.use_dora": True}): "use_dora", "[": "no JSON", odd: "the alpha '8'"}
    for settings, said in others.items():
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": settings})
        with pytest.raises(UsageError, match=said):
            add_lora_file(base, nn.Identity(), file)


def test_names_of_sdxl_in_files_of_kohya(base, file, tmp_path):
    """Its trainer calls the layers as the original layout does: an oracle is our reader of that."""
    names = {name.removeprefix("unet.").partition(".lora_")[0] for name in load_file(file)}
    renamed = {name: to_original_name(name, SIZES["blocks"]) for name in names}
    moved = {name for name in names if name != renamed[name]}
    back = convert_original_unet(
        {f"{name}.weight": torch.ones(1) for name in map(renamed.get, moved)}
        | {f"input_blocks.{SIZES['blocks'] + 1}.0.op.weight": torch.ones(1)}
    )
    assert {f"{name}.weight" for name in moved} <= set(back)
    kohya = {}
    for name, tensor in load_file(file).items():
        layer, _, part = name.removeprefix("unet.").partition(".lora_")
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        kohya[f"lora_unet_{renamed[layer].replace('.', '_')}.{part}"] = tensor
    assert any(name.startswith("lora_unet_output_blocks_") for name in kohya)
    save_file(kohya, tmp_path / "xl.safetensors")
    expected = call(with_file(base, file))
    torch.testing.assert_close(call(with_file(base, tmp_path / "xl.safetensors")), expected)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_adapters_of_text_encoders_are_added(base, tmp_path, layout):
    torch.manual_seed(0)
    model, tokenizer = text_tower(CLIPTextModel, make_tokenizer()), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = ClipTextEncoder(str(tmp_path))
    name, down, up = (
        "text_model.encoder.layers.1.self_attn.q_proj",
        torch.randn(2, 16),
        torch.randn(16, 2),
    )
    prefix, parts = f"text_encoder.{name}", ("lora_A", "lora_B")
    if layout == "kohya":
        prefix, parts = f"lora_te_{name.replace('.', '_')}", ("lora_down", "lora_up")
    tensors = dict(zip([f"{prefix}.{part}.weight" for part in parts], (down, up), strict=True))
    save_file(tensors, tmp_path / "lora.safetensors")
    before = encoder.model.encoder.layers[1].self_attn.q_proj.weight.clone()
    add_lora_file(base, encoder, tmp_path / "lora.safetensors", weight=0.5)
    after = encoder.model.encoder.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(after, before + 0.5 * up @ down)
