"""Shapes: B captions, L tokens, D text width."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from no_hub import width_without_hub
from shell import BRIEF, TRAIN, run, tensors
from tiny_t5 import save_tiny_t5
from transformers import CLIPTextModel, T5EncoderModel, T5Tokenizer
from world import CAPTIONS

from ldm.models.text.t5 import T5TextEncoder

L = 24
SHORT, LONG = ["a red circle", "", "A blue\tsquare! ☃"], "red circle blue " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5") / "tiny", CAPTIONS)


@pytest.fixture(scope="module")
def text(folder) -> T5TextEncoder:
    return T5TextEncoder(str(folder), max_length=L)


def test_states_are_those_of_transformers_without_any_padding(text, folder):
    tokenizer, model = T5Tokenizer.from_pretrained(folder), T5EncoderModel.from_pretrained(folder)
    got = text(SHORT)
    assert got.tokens.shape == (3, L, 16)
    assert got.concat is None
    for i, caption in enumerate(SHORT):
        with torch.no_grad():
            alone = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        n = len(alone)
        torch.testing.assert_close(got.tokens[i, :n], alone, rtol=0, atol=1e-5)
        assert got.mask[i].tolist() == [True] * n + [False] * (L - n)
        assert not got.tokens[i, n:].any()
        torch.testing.assert_close(got.pooled[i], alone.mean(0), rtol=0, atol=1e-5)


def test_padding_changes_nothing(text, folder):
    longer = T5TextEncoder(str(folder), max_length=3 * L)(SHORT)
    torch.testing.assert_close(longer.tokens[:, :L], text(SHORT).tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(longer.pooled, text(SHORT).pooled, rtol=0, atol=1e-5)


def test_sizes_are_the_models_and_it_stays_frozen(text, folder):
    assert (text.width, text.pooled_width, text.max_length) == (16, 16, L)
    plain = T5TextEncoder(str(folder), max_length=L, pooled=False)
    assert (plain.pooled_width, plain(SHORT).pooled) == (0, None)
    torch.nn.ModuleList([text]).train()
    assert not any(module.training for module in text.modules())
    assert not any(parameter.requires_grad for parameter in text.parameters())


def test_null_is_the_empty_caption_encoded_once(folder):
    text = T5TextEncoder(str(folder), max_length=L)
    with torch.inference_mode():  # of a validation
        null = text.null(3)
    expected, seen = text(["", "", ""]), text.tokenize.seen
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(null, name), getattr(expected, name))
    assert text.null(5).tokens.data_ptr() == null.tokens.data_ptr()
    assert text.tokenize.seen == seen
    layer = torch.nn.Linear(16, 1)
    layer(text.null(1).tokens).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    keep = torch.tensor([True, False, True])
    assert torch.equal(text(SHORT).where(keep, text.null(3)).mask[1], expected.mask[1])


def test_long_captions_keep_the_end_token_and_warn_once(folder):
    text = T5TextEncoder(str(folder), max_length=8)
    with pytest.warns(UserWarning, match="is cut to 8: 'red circle blue red") as caught:
        conds = [text(captions) for captions in (["a", LONG], [LONG])]
    assert len(caught) == 1
    assert (text.tokenize.seen, text.truncated) == (3, 2)
    assert conds[0].mask[1].all()
    assert text.tokenize([LONG])[0, -1] == text.tokenize.tokenizer.eos_token_id


def test_bfloat16_halves_the_weights_and_gives_float32(text, folder):
    half = T5TextEncoder(str(folder), max_length=L, dtype="bfloat16")
    assert half.model.shared.weight.dtype == torch.bfloat16
    cond = half(SHORT)
    assert cond.tokens.dtype == cond.pooled.dtype == torch.float32
    apart = (cond.tokens - text(SHORT).tokens).abs().max() / text(SHORT).tokens.abs().max()
    assert 0 < apart < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text(SHORT).tokens, text([*SHORT]).tokens)
        states = text(SHORT).tokens
    assert torch.equal(states, text(SHORT).tokens), "a trainer's precision is not T5's"
    with pytest.raises(ValueError, match="overflow in float16"):
        T5TextEncoder(str(folder), dtype="float16")


def test_the_t5_of_a_pipeline_is_found(text, folder, tmp_path):
    CLIPTextModel(CLIPTextModel.config_class(hidden_size=8, num_attention_heads=1)).save_pretrained(
        tmp_path / "text_encoder"
    )
    T5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "text_encoder_2")
    T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer_2")
    found = T5TextEncoder(str(tmp_path), max_length=L)
    assert torch.equal(found(SHORT).tokens, text(SHORT).tokens)


@pytest.mark.parametrize("caption", ["a\x00b", "\ud83d", "שלום עולם", "x" * 10_000])
@pytest.mark.filterwarnings("ignore:a caption of")
def test_odd_captions_are_encoded(text, caption):
    assert text([caption]).tokens.isfinite().all()


def test_one_string_is_refused(text):
    with pytest.raises(TypeError, match=r"write \['a cat'\]"):
        text("a cat")


def test_a_folder_without_t5_is_refused_with_a_remedy(folder, tmp_path):
    with pytest.raises(OSError, match=r"(?s)no T5 encoder at .*Give a folder with"):
        T5TextEncoder(str(tmp_path))
    other = shutil.copytree(folder, tmp_path / "wide")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"d_model": 32}))
    with pytest.raises(ValueError, match=r"not those of the T5EncoderModel in its config\.json"):
        T5TextEncoder(str(other))
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"put the model's own tokenizer\.json there"):
        T5TextEncoder(str(bare))
    (bare / "spiece.model").write_bytes(b"sentences")
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        T5TextEncoder(str(bare))


def test_a_pickle_is_not_opened(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "pickled")
    model = T5EncoderModel.from_pretrained(other)
    (other / "model.safetensors").unlink()
    torch.save(model.state_dict(), other / "pytorch_model.bin")
    with pytest.raises(OSError, match="no T5 encoder"):
        T5TextEncoder(str(other))


@pytest.mark.slow
def test_folders_are_never_looked_up_on_the_hub(folder):
    assert width_without_hub(T5TextEncoder, folder, seconds=120) == "16"


@pytest.mark.slow
def test_a_run_trains_and_generates_images_with_t5(folder, tmp_path):
    scenes = ["data=scenes", "data.size=32", "data.count=40", "data.val_count=10", "data.family=1"]
    brief = [word for word in BRIEF if not word.startswith("data") or "batch" in word]
    own = ["text_encoder=t5", f"text_encoder.path={folder}", "text_encoder.max_length=32"]
    few = [
        "model=nano",
        "model.channels=16",
        "eval=none",
        "logger=csv",
        "name=t5",
        "data.workers=0",
    ]
    ends = ["trainer.val_check_interval=2", "trainer.max_steps=2"]
    run(TRAIN, *brief, *scenes, *own, *few, *ends, cwd=tmp_path)
    state = tensors(tmp_path / "runs" / "t5")["state_dict"]
    assert any(
        tensor.shape[-1] == 16 for name, tensor in state.items() if "cross_attn.to_k" in name
    )
    sample = str(Path(TRAIN).with_name("sample.py"))
    words = ["ckpt=runs/t5", "prompt=a red circle", "steps=2", "n=1", "out=x.png"]
    assert "x.png" in run(sample, *words, cwd=tmp_path)
