"""The text encoders of published pipelines: diffusers' `encode_prompt` is the expectation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from pipeline_text import (
    LENGTH,
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXT,
    write_old_tokenizer,
    write_sdxl_text,
    write_text_encoder,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.clip import Clip, train_tokenizer
from ldm.models.text.cached import CachedTextEncoder
from ldm.models.text.clip import ClipTextEncoder
from ldm.models.text.packaged import PACKAGED_CLIP
from ldm.models.text.paired import PairedTextEncoder
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_module

TOKENIZER = train_tokenizer(["a red circle above a blue square!"] * 3, vocab_size=540)
PROMPTS = ["a red circle", "a blue square!", "", "circle above " * 20]
CLOSE = {"rtol": 0, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:a caption of")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd1")
    write_text_encoder(folder, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return write_sdxl_text(tmp_path_factory.mktemp("sdxl"), TOKENIZER)


def by_diffusers(folder: Path, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of `PROMPTS`, and of no prompt."""
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if "clip_skip" in options:  # diffusers 0.42 looks for the norm where transformers 4 had it
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    with torch.no_grad():
        return pipe.encode_prompt(PROMPTS, "cpu", 1, True, **options)


def by_diffusers_xl(folder: Path, *, zero_empty: bool, **options: object) -> list[torch.Tensor]:
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=None,
        scheduler=None,
        force_zeros_for_empty_prompt=zero_empty,
        add_watermarker=False,
    )
    with torch.no_grad():
        return pipe.encode_prompt(PROMPTS, device="cpu", **options)


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_clip_skip_is_a_layer_with_the_final_norm(sd1, clip_skip):
    expected, empty = by_diffusers(sd1, clip_skip=clip_skip)
    text = ClipTextEncoder(str(sd1), layer=-1 - (clip_skip or 0))
    torch.testing.assert_close(text(PROMPTS).tokens, expected, **CLOSE)
    if clip_skip is None:  # diffusers skips no layer of the negative prompt
        torch.testing.assert_close(text.null(4).tokens, empty, **CLOSE)


def test_a_folder_of_stable_diffusion_2_pads_with_its_own_token(tmp_path):
    write_text_encoder(tmp_path, TOKENIZER, hidden_act="gelu")
    write_old_tokenizer(tmp_path / "tokenizer", pad="!")
    text = ClipTextEncoder(str(tmp_path))
    expected, empty = by_diffusers(tmp_path)
    torch.testing.assert_close(text(PROMPTS).tokens, expected, **CLOSE)
    torch.testing.assert_close(text.null(4).tokens, empty, **CLOSE)
    ids = text.tokenize(["a", *PROMPTS])
    assert (ids[0, 3:] == TOKENIZER.convert_tokens_to_ids("!")).all()


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1_TEXT, SD2_TEXT], ids=["1.x", "2.x"])
def test_encoders_of_published_sizes(config, tmp_path):
    write_text_encoder(tmp_path, TOKENIZER, length=77, **config)
    write_old_tokenizer(tmp_path / "tokenizer", pad="!", length=77)
    text = ClipTextEncoder(str(tmp_path))
    found = text(PROMPTS).tokens
    assert found.shape == (4, 77, config["hidden_size"])
    del text
    torch.testing.assert_close(found, by_diffusers(tmp_path)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_pair_of_published_sizes(tmp_path):
    """One model at a time: float32 takes 3.3 GB."""
    write_text_encoder(tmp_path, TOKENIZER, length=77, **SD1_TEXT)
    write_text_encoder(
        tmp_path, TOKENIZER, seed=1, suffix="_2", projected=True, length=77, **SDXL_TEXT
    )
    write_old_tokenizer(tmp_path / "tokenizer_2", pad="!", length=77)
    text = PairedTextEncoder(str(tmp_path))
    found = text(PROMPTS)
    assert (text.width, text.pooled_width, text.max_length) == (2048, 1280, 77)
    del text
    tokens, _, pooled, _ = by_diffusers_xl(tmp_path, zero_empty=True)
    torch.testing.assert_close(found.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_empty", [True, False])
def test_a_pair_is_that_of_stable_diffusion_xl(sdxl, zero_empty):
    text = PairedTextEncoder(str(sdxl), zero_empty=zero_empty)
    found, null = text(PROMPTS), text.null(4)
    ours = [found.tokens, null.tokens, found.pooled, null.pooled]
    for got, expected in zip(ours, by_diffusers_xl(sdxl, zero_empty=zero_empty), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert (text.width, text.pooled_width, text.max_length) == (16 + 24, 20, LENGTH)
    assert found.tokens.shape == (4, LENGTH, text.width)
    assert found.pooled.shape == (4, text.pooled_width)
    assert found.mask is None
    assert zero_empty == (not null.tokens.any() and not null.pooled.any())


def test_a_negative_prompt_has_its_own_pooled_state(sdxl):
    negative = ["blue", "red", "a circle", "square"]
    _, tokens, _, pooled = by_diffusers_xl(sdxl, zero_empty=True, negative_prompt=negative)
    found = PairedTextEncoder(str(sdxl))(negative)
    torch.testing.assert_close(found.tokens, tokens, **CLOSE)
    torch.testing.assert_close(found.pooled, pooled, **CLOSE)


def test_clip_skip_of_a_pair_is_one_layer_further(sdxl):
    expected, _, pooled, _ = by_diffusers_xl(sdxl, zero_empty=True, clip_skip=1)
    found = PairedTextEncoder(str(sdxl), layer=-3)(PROMPTS)
    torch.testing.assert_close(found.tokens, expected, **CLOSE)
    torch.testing.assert_close(found.pooled, pooled, **CLOSE)


def test_a_long_caption_is_cut_and_counted_once(sdxl):
    text = PairedTextEncoder(str(sdxl))
    text(PROMPTS)
    assert text.truncated == 1


def test_a_pair_is_frozen_and_a_null_is_made_once(sdxl):
    text = PairedTextEncoder(str(sdxl)).train()
    assert not any(module.training for module in text.modules())
    assert not any(parameter.requires_grad for parameter in text.parameters())
    assert text.null(2).tokens.data_ptr() == text.null(5).tokens.data_ptr()
    assert text.to(torch.bfloat16).null(1).pooled.dtype == torch.bfloat16


def test_a_pair_goes_through_a_cache(sdxl):
    text = PairedTextEncoder(str(sdxl))
    cached, expected = CachedTextEncoder(text), text(PROMPTS)
    for _ in range(2):
        found = cached(PROMPTS)
        torch.testing.assert_close(found.tokens, expected.tokens, **CLOSE)
        torch.testing.assert_close(found.pooled, expected.pooled, **CLOSE)
    assert torch.equal(cached.null(2).pooled, text.null(2).pooled)
    assert (cached.width, cached.pooled_width) == (text.width, text.pooled_width)


def test_a_saved_pair_is_the_same_for_us_and_for_diffusers(sdxl, tmp_path):
    text = PairedTextEncoder(str(sdxl))
    text.save(tmp_path / "copy")
    again = PairedTextEncoder(str(tmp_path / "copy"))
    assert hash_module(again) == hash_module(text)
    assert torch.equal(again(PROMPTS).tokens, text(PROMPTS).tokens)
    copy, first = (by_diffusers_xl(each, zero_empty=True) for each in (tmp_path / "copy", sdxl))
    assert all(torch.equal(a, b) for a, b in zip(copy, first, strict=True))


def test_a_folder_with_one_text_encoder_is_no_pair(sd1):
    with pytest.raises(ValueError, match=r"has no text_encoder_2: .* take text_encoder=clip"):
        PairedTextEncoder(str(sd1))


def test_encoders_of_two_lengths_are_no_pair(sdxl, tmp_path):
    folder = shutil.copytree(sdxl, tmp_path / "pair")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder")
    weights = model.state_dict()
    weights["embeddings.position_embedding.weight"] = torch.zeros(8, 16)
    model.config.max_position_embeddings = 8
    model.save_pretrained(folder / "text_encoder", state_dict=weights)
    with pytest.raises(ValueError, match=r"read 8 and 12 tokens: only two of one length"):
        PairedTextEncoder(str(folder))


def test_a_part_of_a_pipeline_folder_has_its_tokenizer_beside_it(sdxl):
    second = ClipTextEncoder(f"{sdxl}/text_encoder_2")
    assert second.width == 24
    assert second.tokenize.tokenizer.pad_token == "!"
    first = ClipTextEncoder(f"{sdxl}/text_encoder")
    assert torch.equal(first(PROMPTS).tokens, ClipTextEncoder(str(sdxl))(PROMPTS).tokens)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("norm", [True, False])
def test_any_layer_with_and_without_the_norm(sd1, layer, norm):
    """hidden_states of transformers end before the final norm."""
    text = ClipTextEncoder(str(sd1), layer=layer, norm=norm, pooled=True)
    model = CLIPTextModel.from_pretrained(sd1 / "text_encoder").eval()
    with torch.no_grad():
        out = model(text.tokenize(PROMPTS), output_hidden_states=True)
        states = out.hidden_states[layer]
        expected = model.final_layer_norm(states) if norm else states
    found = text(PROMPTS)
    torch.testing.assert_close(found.tokens, expected, **CLOSE)
    torch.testing.assert_close(found.pooled, out.pooler_output, **CLOSE)  # of the last layer
    plain = ClipTextEncoder(str(sd1), pooled=True)
    assert torch.equal(found.tokens, plain(PROMPTS).tokens) == (layer == -1 and norm)


def test_the_projection_of_a_whole_clip_is_its_own(tmp_path):
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 2, "heads": 2, "projection": 8, "max_length": LENGTH}
    Clip(tokenizer=TOKENIZER, image_size=16, patch_size=8, **sizes).save(tmp_path)
    text = ClipTextEncoder(str(tmp_path), pooled=True, projected=True)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(tmp_path).eval()
        expected = model.get_text_features(text.tokenize(PROMPTS)).pooler_output
    assert text.pooled_width == 8
    torch.testing.assert_close(text(PROMPTS).pooled, expected, **CLOSE)


CHOICES = [{"layer": -2}, {"norm": False}, {"layer": -2, "norm": False}]
CHOICES += [{"pooled": True, "projected": True}, {"layer": -3, "pooled": True, "projected": True}]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_packaged_encoder_takes_every_choice_without_transformers(choice, tmp_path):
    packaged = ClipTextEncoder(PACKAGED_CLIP, **choice)
    by_transformers = ClipTextEncoder(str(resolve_path(PACKAGED_CLIP)), **choice)
    captions = ["a red circle", "two blue stars"]
    found, expected = packaged(captions), by_transformers(captions)
    torch.testing.assert_close(found.tokens, expected.tokens, **CLOSE)
    if "pooled" in choice:
        torch.testing.assert_close(found.pooled, expected.pooled, **CLOSE)
    packaged.save(tmp_path / "copy")
    copy = ClipTextEncoder(str(tmp_path / "copy"), **choice)
    assert hash_module(copy) == hash_module(packaged) == hash_module(by_transformers)
    assert torch.equal(copy(captions).tokens, by_transformers(captions).tokens)


def test_each_choice_has_its_own_digest_and_the_default_the_former_one(sd1):
    plain = ClipTextEncoder(str(sd1))
    assert set(plain.state_dict()) == {f"model.{key}" for key in plain.model.state_dict()}
    digests = [hash_module(plain), hash_module(ClipTextEncoder(str(sd1), pooled=True))]
    assert digests[0] == digests[1]
    choices = [hash_module(ClipTextEncoder(str(sd1), **choice)) for choice in CHOICES[:3]]
    assert len({digests[0], *choices}) == 4


def test_each_choice_of_a_pair_has_its_own_digest(sdxl, tmp_path):
    padded = shutil.copytree(sdxl, tmp_path / "other")
    settings = json.loads((padded / "tokenizer_2" / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<|endoftext|>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (padded / "tokenizer_2" / name).write_text(json.dumps(settings))
    pairs = [PairedTextEncoder(str(sdxl)), PairedTextEncoder(str(sdxl), layer=-3)]
    pairs += [PairedTextEncoder(str(sdxl), zero_empty=False), PairedTextEncoder(str(padded))]
    assert len({hash_module(each) for each in pairs}) == 4


def test_a_layer_that_is_not_there_is_refused(sd1):
    for layer in (0, 2, -4):
        with pytest.raises(ValueError, match=rf"layer={layer}: .* has 3 layers: give -1"):
            ClipTextEncoder(str(sd1), layer=layer)


def test_an_encoder_that_masks_its_padding_is_refused(sd1, tmp_path):
    folder = shutil.copytree(sd1, tmp_path / "masked")
    file = folder / "text_encoder" / "config.json"
    for value in (False, True):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_attention_mask": value}))
        if not value:
            ClipTextEncoder(str(folder))
    with pytest.raises(ValueError, match="has use_attention_mask=true"):
        ClipTextEncoder(str(folder))


def test_a_projection_of_no_pooled_state_is_refused(sd1):
    with pytest.raises(ValueError, match=r"add text_encoder\.pooled=true"):
        ClipTextEncoder(str(sd1), projected=True)


def test_a_projection_that_the_folder_lacks_is_refused(sd1):
    with pytest.raises(ValueError, match=r"parameters are missing .* text_projection.weight"):
        ClipTextEncoder(str(sd1), pooled=True, projected=True)


def test_a_pipeline_on_the_hub_is_named_by_its_owner_and_name(sdxl, tmp_path, monkeypatch):
    """From the hub's cache, as no test has a network."""
    place = tmp_path / "models--team--xl"
    shutil.copytree(sdxl, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = PairedTextEncoder("team/xl")
    assert hash_module(found) == hash_module(PairedTextEncoder(str(sdxl)))
    assert ClipTextEncoder("team/xl/text_encoder_2").tokenize.tokenizer.pad_token == "!"
