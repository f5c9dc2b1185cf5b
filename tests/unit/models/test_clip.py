"""Shapes: B pairs, P projection width."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ldm.models.clip import Clip, contrastive_loss, retrieval_accuracy, train_tokenizer
from ldm.models.text.clip import ClipTextEncoder

CAPTIONS = ["a red circle", "a blue square above a circle", "", "the red square"]
TOKENIZER = train_tokenizer(CAPTIONS * 3, vocab_size=530)
COCO = Path("/work/shared/data/coco_mini/annotations/captions_val2017.json")


def small_clip(**changes) -> Clip:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "width": 16, "layers": 2, "heads": 2, "projection": 8}
    return Clip(tokenizer=TOKENIZER, **sizes | {"max_length": 20} | changes)


def unit_vectors(*, count: int, width: int = 8, seed: int) -> torch.Tensor:
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise, dim=1)


def test_features_and_loss_are_those_of_transformers(tmp_path):
    clip = small_clip().eval()
    clip.save(tmp_path / "clip")
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False)
    pixels = processor(list((images + 1) / 2), return_tensors="pt").pixel_values
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    text = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        oracle = CLIPModel.from_pretrained(tmp_path / "clip").eval()
        expected = oracle(text.input_ids, pixels, return_loss=True)
        image_features, text_features = clip.encode_images(images), clip.encode_texts(CAPTIONS)
        loss = contrastive_loss(image_features, text_features, clip.logit_scale)
    torch.testing.assert_close(image_features, expected.image_embeds)
    torch.testing.assert_close(text_features, expected.text_embeds)
    torch.testing.assert_close(loss, expected.loss)


def pixels_seen(clip: Clip, images: torch.Tensor) -> torch.Tensor:
    """What reaches the vision transformer, back in [0, 1]."""
    seen = []
    clip.model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    assert clip.encode_images(images).shape == (len(images), 8)
    return seen[0] * clip.pixel_std + clip.pixel_mean


def test_other_sizes_are_resized_as_published_clip_does():
    pixels = np.random.default_rng(0).integers(64, 192, (48, 48, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    got = pixels_seen(small_clip(), torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    assert np.abs(got[0].permute(1, 2, 0).numpy() - expected).max() < 1 / 255


def test_resizing_squashes_and_stays_in_range():
    images = torch.zeros(2, 3, 24, 40).bernoulli_() * 2 - 1
    pixels = pixels_seen(small_clip(), images)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_a_caption_does_not_depend_on_longer_ones_in_its_batch():
    clip = small_clip().eval()
    together = clip.encode_texts(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(clip.encode_texts([caption])[0], together[i])


def test_training_moves_every_parameter_and_the_loss_falls():
    clip = small_clip()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(clip.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        features = clip.encode_images(images), clip.encode_texts(CAPTIONS)
        loss = contrastive_loss(*features, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in clip.parameters())
    assert losses[-1] < 0.1 < 1 < losses[0]
    assert retrieval_accuracy(*features, CAPTIONS) == 1


def test_logit_scale_starts_at_the_papers_and_stops_at_100():
    clip = small_clip()
    torch.testing.assert_close(clip.logit_scale, torch.tensor(1 / 0.07), rtol=1e-4, atol=0)
    clip.model.logit_scale.data.fill_(7.0)
    torch.testing.assert_close(clip.logit_scale, torch.tensor(100.0))
    clip.max_scale = 10.0
    torch.testing.assert_close(clip.logit_scale, torch.tensor(10.0))


def test_a_saved_clip_loads_here_and_as_a_text_encoder(tmp_path):
    clip = small_clip().eval()
    clip.save(tmp_path / "clip")
    clip.model.text_projection.weight.data.mul_(-1)
    clip.save(tmp_path / "clip")  # again: the folder is replaced
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    loaded = Clip.load(str(tmp_path))
    assert torch.equal(loaded.encode_texts(CAPTIONS), clip.encode_texts(CAPTIONS))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encode_images(images), clip.encode_images(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    text = ClipTextEncoder(str(tmp_path / "clip"))
    with torch.no_grad():
        states = clip.model.text_model(clip.tokenize(CAPTIONS)).last_hidden_state
    assert torch.equal(text(CAPTIONS).tokens, states)
    assert CLIPTokenizer.from_pretrained(tmp_path / "clip").model_max_length == 20


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match="patch_size 7 does not divide image_size 16"):
        small_clip(patch_size=7)


def test_loss_in_autocast_is_that_of_float32():
    features = unit_vectors(count=6, seed=0), unit_vectors(count=6, seed=1)
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contrastive_loss(*features, scale)
    assert torch.equal(got, contrastive_loss(*features, scale))


def test_retrieval_counts_equal_captions_as_hits():
    text = unit_vectors(count=4, seed=0)
    images = text[[1, 0, 2, 2]]  # the first two point at each other's caption, the last at another
    assert retrieval_accuracy(images, text, ["a", "b", "c", "d"]) == 0.25
    assert retrieval_accuracy(images, text, ["a", "a", "c", "d"]) == 0.75


def test_the_vocabulary_is_laid_out_as_clips():
    vocab = TOKENIZER.get_vocab()
    assert sorted(vocab.values()) == list(range(530))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (528, 529)
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    by_id = TOKENIZER.convert_ids_to_tokens(range(530))
    assert [token + "</w>" for token in by_id[:256]] == by_id[256:512]
    assert len(TOKENIZER("Red CIRCLE").input_ids) == 4  # both words were merged, in any case


@pytest.mark.parametrize("captions", [[], ["a"], ["😀 שלום"]])
def test_few_captions_make_a_smaller_vocabulary(captions):
    tokenizer = train_tokenizer(captions)
    assert 514 <= len(tokenizer) < 530
    assert tokenizer.decode(tokenizer("ab!").input_ids, skip_special_tokens=True) == "ab !"


def test_a_vocabulary_has_room_for_the_bytes():
    assert len(train_tokenizer(CAPTIONS, vocab_size=514)) == 514
    with pytest.raises(ValueError, match="vocab_size is 513; the bytes alone need 514"):
        train_tokenizer(CAPTIONS, vocab_size=513)


@given(st.text(st.characters(exclude_categories=("Cs", "Zs", "Zl", "Zp", "Cc")), max_size=30))
def test_a_word_comes_back_from_its_ids(word):
    normal = TOKENIZER.backend_tokenizer.normalizer.normalize_str(word)
    back = TOKENIZER.decode(TOKENIZER(word).input_ids[1:-1])
    assert "".join(back.split()) == "".join(normal.split())


def test_the_tokenizer_depends_on_the_captions_alone():
    """Hash tables are seeded anew by process, so a second process is asked too."""
    code = (
        "import random, sys; from ldm.models.clip import train_tokenizer; r = random.Random(0);"
        "words = [''.join(r.choices('abcdefgh', k=4)) for _ in range(3000)];"
        "print(train_tokenizer(words, vocab_size=900).backend_tokenizer.to_str())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(3000)]
    ours = train_tokenizer(words, vocab_size=900).backend_tokenizer.to_str()
    assert output.strip() == ours


@pytest.mark.skipif(not COCO.exists(), reason=f"no COCO captions at {COCO}")
def test_coco_captions_fit_the_published_length():
    captions = [note["caption"] for note in json.loads(COCO.read_text())["annotations"]]
    tokenizer = train_tokenizer(captions)
    lengths = [len(row) for row in tokenizer(captions).input_ids]
    assert len(tokenizer) == 2048
    assert max(lengths) <= 77
    assert sum(lengths) / len(lengths) < 18
