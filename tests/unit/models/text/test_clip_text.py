"""Shapes: B captions, L tokens, D text width."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from no_hub import width_without_hub
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm.models.clip import Clip, train_tokenizer
from ldm.models.text.base import CaptionTokenizer
from ldm.models.text.clip import ClipTextEncoder, load_clip

L = 12
SHORT, LONG = ["a red circle", "", "a Blue\tsquare!"], "one two three " * 20
TOKENIZER = train_tokenizer(["a red circle above a blue square"] * 3, vocab_size=540)


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 2, "heads": 2, "projection": 8, "max_length": L}
    folder = tmp_path_factory.mktemp("models") / "clip"
    Clip(tokenizer=TOKENIZER, image_size=16, patch_size=8, **sizes).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(clip_folder) -> ClipTextEncoder:
    return ClipTextEncoder(str(clip_folder), pooled=True)


def encode_as_transformers_does(folder: Path, captions: list[str]):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    padded = {"padding": "max_length", "truncation": True, "max_length": L, "return_tensors": "pt"}
    ids = tokenizer(captions, **padded).input_ids
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder).eval().text_model(input_ids=ids)


@pytest.mark.filterwarnings("ignore:a caption of")
def test_states_are_those_of_transformers(text, clip_folder):
    captions = [*SHORT, LONG]
    expected, got = encode_as_transformers_does(clip_folder, captions), text(captions)
    assert got.tokens.shape == (4, L, 16)
    torch.testing.assert_close(got.tokens, expected.last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.pooled, expected.pooler_output, rtol=0, atol=1e-6)
    assert got.mask is None
    assert got.concat is None


def test_sizes_are_the_models(text, clip_folder):
    assert (text.width, text.pooled_width, text.max_length) == (16, 16, L)
    plain = ClipTextEncoder(str(clip_folder))
    assert plain.pooled_width == 0
    assert plain(SHORT).pooled is None


def test_stays_frozen_inside_a_module_in_training(text):
    torch.nn.ModuleList([text]).train()
    assert not any(module.training for module in text.modules())
    assert not any(parameter.requires_grad for parameter in text.parameters())
    assert not text(SHORT).tokens.requires_grad


def test_null_is_the_empty_caption_encoded_once(clip_folder):
    text = ClipTextEncoder(str(clip_folder), pooled=True)
    null, expected = text.null(3), text(["", "", ""])
    assert torch.equal(null.tokens, expected.tokens)
    assert torch.equal(null.pooled, expected.pooled)
    seen = text.tokenize.seen
    assert text.null(5).tokens.data_ptr() == null.tokens.data_ptr()
    assert text.tokenize.seen == seen
    assert text.null(0).tokens.shape == (0, L, 16)
    assert text.to(torch.bfloat16).null(1).tokens.dtype == torch.bfloat16


def test_a_null_condition_from_a_validation_works_in_training(clip_folder):
    text = ClipTextEncoder(str(clip_folder))
    with torch.inference_mode():
        text.null(1)
    layer = torch.nn.Linear(16, 1)
    layer(text.null(1).tokens).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_long_captions_keep_start_and_end_token_and_warn_once():
    tokenize = CaptionTokenizer(TOKENIZER, L)
    with pytest.warns(UserWarning, match=r"is cut to 12: 'one two three one") as caught:
        ids = torch.cat([tokenize(["a", LONG]), tokenize([LONG])])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (tokenize.seen, tokenize.truncated) == (3, 2)
    assert ids[:, 0].tolist() == [TOKENIZER.bos_token_id] * 3
    assert ids[1:, -1].tolist() == [TOKENIZER.eos_token_id] * 2
    assert (ids[1:, 1:-1] != TOKENIZER.eos_token_id).all()


def test_a_caption_that_just_fits_is_not_cut():
    tokenize = CaptionTokenizer(TOKENIZER, L)
    tokenize(["! " * (L - 2)])
    assert tokenize.truncated == 0
    with pytest.warns(UserWarning, match="13 tokens"):
        tokenize(["! " * (L - 1)])
    assert tokenize.truncated == 1


@given(st.lists(st.text(st.characters(codec=None, exclude_categories=()), max_size=40), min_size=1))
def test_any_string_has_ids(captions):
    ids = CaptionTokenizer(TOKENIZER, 400)(captions)
    assert ids.shape == (len(captions), 400)
    assert ids.min() >= 0
    assert ids.max() < len(TOKENIZER)
    assert (ids[:, 0] == TOKENIZER.bos_token_id).all()
    assert (ids[:, -1] == TOKENIZER.eos_token_id).all()


@pytest.mark.parametrize("caption", ["x" * 100_000, "😀" * 30_000, "a\x00b", "\ud83d", "שלום עולם"])
@pytest.mark.filterwarnings("ignore:a caption of")
def test_odd_captions_are_encoded(text, caption):
    assert text([caption]).tokens.isfinite().all()


def test_one_string_is_refused(text):
    with pytest.raises(TypeError, match=r"write \['a cat'\]"):
        text("a cat")


def test_pooled_states_are_whitened_if_the_folder_has_a_whitening(text, clip_folder, tmp_path):
    folder = tmp_path / "run" / "clip"
    clip = Clip.load(str(clip_folder))
    whiten = clip.measure_whitening([*SHORT, "a dog", "a red dog"])
    clip.save(folder, whiten)
    got = ClipTextEncoder(str(tmp_path / "run"), pooled=True)(SHORT)
    assert torch.equal(got.tokens, text(SHORT).tokens)
    torch.testing.assert_close(got.pooled, whiten(text(SHORT).pooled), rtol=0, atol=1e-5)
    assert ClipTextEncoder(str(folder))(SHORT).pooled is None


def test_text_model_pipeline_and_run_directories_load(text, clip_folder, tmp_path):
    tower = tmp_path / "pipeline" / "text_encoder"
    CLIPTextModel.from_pretrained(clip_folder).save_pretrained(tower)
    TOKENIZER.save_pretrained(tmp_path / "pipeline" / "tokenizer")
    shutil.copytree(tower, tmp_path / "tower")
    TOKENIZER.save_pretrained(tmp_path / "tower")
    shutil.copytree(clip_folder, tmp_path / "run" / "clip")
    for layout in ("tower", "pipeline", "run"):
        assert torch.equal(
            ClipTextEncoder(str(tmp_path / layout))(SHORT).tokens, text(SHORT).tokens
        )


def test_vocab_and_merges_files_and_half_precision_weights_load(text, clip_folder, tmp_path):
    CLIPTextModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    model = json.loads((clip_folder / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | TOKENIZER.get_added_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    tokens = ClipTextEncoder(str(tmp_path))(SHORT).tokens
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, text(SHORT).tokens, rtol=0, atol=1e-2)


def test_folders_are_never_looked_up_on_the_hub(clip_folder):
    assert width_without_hub(ClipTextEncoder, clip_folder, seconds=60) == "16"


OTHERS_CODE = {
    "_attn_implementation": "stranger/kernel",
    "attn_implementation": "stranger/kernel@main:run",
    "_attn_implementation_internal": "stranger/kernel",
    "_experts_implementation": "stranger/kernel",
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
    "quantization_config": {"quant_method": "awq"},
    "transformers_weights": "../evil.bin",
    "per_layer_config": {"0": {"hidden_size": 4}},
    "trust_remote_code": True,
    "to_dict": "evil",
    "_name_or_path": "stranger/model",
}


@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_the_computation_in_the_file_are_ignored(clip_folder, tmp_path, nested):
    """Names of kernels on the hub are fetched and run by transformers, where it has the package."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    for node in (config["text_config"], config["vision_config"]) if nested else (config,):
        node |= OTHERS_CODE
    (folder / "config.json").write_text(json.dumps(config))
    plain = ClipTextEncoder(str(clip_folder))
    for kind in (CLIPModel, CLIPTextModel):
        model, _ = load_clip(kind, str(folder))
        for each in (model, *(m for m in model.modules() if hasattr(m, "config"))):
            assert each.config._attn_implementation == plain.model.config._attn_implementation
            assert not set(vars(each.config)) & {"auto_map", "quantization_config", "to_dict"}
    found = ClipTextEncoder(str(folder))
    assert torch.equal(found(["a red ball"]).tokens, plain(["a red ball"]).tokens)


@pytest.mark.parametrize("config", ["[]", "{", "{}", '{"text_config": []}', '{"text_config": 5}'])
def test_a_file_that_is_no_config_is_refused(clip_folder, tmp_path, config):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "config.json").write_text(config)
    with pytest.raises((OSError, ValueError)):
        ClipTextEncoder(str(folder))


def test_weights_of_another_kind_are_refused(clip_folder, tmp_path):
    CLIPTextModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not those of the CLIPModel .* parameters are missing"):
        Clip.load(str(tmp_path))


def test_weights_of_another_size_are_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another shape, such as .*position_embedding.weight"):
        ClipTextEncoder(str(folder))


def test_a_pickle_is_not_executed(clip_folder, tmp_path):
    """A .bin file of plain tensors loads, one that calls something does not."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), folder / "pytorch_model.bin")
    assert ClipTextEncoder(str(folder)).width == 16
    torch.save({"weight": Touch(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no CLIP model at(.|\n)*could run code"):
        ClipTextEncoder(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["runs/../nothing/here/at/all", "/no/such/folder", "", "a b"])
def test_a_missing_path_names_what_to_give(path):
    with pytest.raises(OSError, match=f"no CLIP model at '{path}'(.|\n)*model.safetensors"):
        ClipTextEncoder(path)


def test_an_unreachable_hub_names_what_to_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no CLIP model at 'no-such-owner/clip'(.|\n)*config.json"):
        ClipTextEncoder("no-such-owner/clip")


def test_unreadable_weights_name_the_folder(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OSError, match=r"no CLIP model at '.*cut'"):
        ClipTextEncoder(str(folder))


def test_missing_tokenizer_files_are_refused(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has 2 tokens, the model's embedding 5\d\d: put"):
        ClipTextEncoder(str(folder))
