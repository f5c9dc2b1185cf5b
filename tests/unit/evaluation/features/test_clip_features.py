"""Shapes: n pictures or captions, D features."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import caption, sample_scene
from ldm.evaluation.features.base import resize_for_network
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.metrics.clip_score import clip_score
from ldm.models.clip import PIXEL_MEAN, PIXEL_STD
from ldm.utils.files import resolve_path

PACKAGED = resolve_path("packaged:clip")


@pytest.fixture(scope="module")
def features() -> ClipFeatures:
    return ClipFeatures()


def scenes(n: int) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, 64, 64) with what they show."""
    drawn = [sample_scene(i, split="val") for i in range(n)]
    pictures = np.stack([draw_scene(scene, 64, rng) for scene, rng in drawn])
    captions = [caption(scene, rng) for scene, rng in drawn]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), captions


def copied(folder: Path, file: str, **changes) -> str:
    """The packaged CLIP with other entries in one of its JSON files."""
    copy = shutil.copytree(PACKAGED, folder / "clip", dirs_exist_ok=True)
    there = json.loads((copy / file).read_text()) if (copy / file).is_file() else {}
    (copy / file).write_text(json.dumps(there | changes))
    return str(copy)


def test_features_are_the_projected_embeddings_of_transformers(features):
    images, _ = scenes(4)
    images = torch.cat([images, images.flip(3)])
    large = torch.nn.functional.interpolate(images, (160, 96))  # squashed to a square again
    mean, std = (torch.tensor(part).reshape(3, 1, 1) for part in (PIXEL_MEAN, PIXEL_STD))
    pixels = (resize_for_network(large, 64) / 255 - mean) / std
    with torch.no_grad():
        net = CLIPModel.from_pretrained(PACKAGED, dtype=torch.float32).eval()
        expected = net.get_image_features(pixel_values=pixels).pooler_output
    found = features(large)
    assert found.shape == (8, features.width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found.norm(dim=1) - 1).abs().min() > 0.1, "they are not normalised"


def test_the_score_is_the_cosine_of_pairs_and_never_negative():
    images = torch.tensor([[3.0, 4.0], [0.0, 5.0], [1.0, 0.0], [-2.0, 0.0]])
    texts = torch.tensor([[0.3, 0.4], [7.0, 0.0], [1.0, 1.0], [0.5, 0.0]])
    expected = torch.tensor([100.0, 0.0, 100 / 2**0.5, 0.0])
    torch.testing.assert_close(clip_score(images, texts), expected)
    torch.testing.assert_close(clip_score(images.bfloat16(), texts), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (2,)])
def test_features_that_are_no_pairs_have_no_score(shape):
    with pytest.raises(ValueError, match=r"of pairs.*\(4, 2\) and \(" + str(shape)[1:-1]):
        clip_score(torch.zeros(4, 2), torch.zeros(shape))


def test_right_captions_score_higher_than_others(features):
    images, captions = scenes(40)
    seen, said = features(images), features.encode_texts(captions)
    own, others = clip_score(seen, said), clip_score(seen, said.roll(1, 0))
    assert own.mean() > others.mean() + 20
    assert (own > others).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore:a caption of")
def test_a_caption_beyond_the_context_keeps_its_end_and_nothing_else_counts(features):
    context = features.clip.max_length
    words = ["a", "red", "circle", "above", "blue", "square"] * 90
    long = " ".join(words[:500])
    cut = " ".join(words[: context - 2])  # a token a word, and room for both ends
    other = f"{cut} {' '.join(reversed(words[:400]))}"
    tokenize, before = features.clip.tokenize, features.truncated
    ids = tokenize([long, cut, other])
    assert ids.shape == (3, context)
    assert (ids[:, -1] == tokenize.tokenizer.eos_token_id).all()
    assert (ids == ids[0]).all(), "the three are one to the network"
    images = scenes(3)[0]
    scores = clip_score(
        features(images[:1]).expand(3, -1), features.encode_texts([long, cut, other])
    )
    torch.testing.assert_close(scores, scores[:1].expand(3), rtol=1e-6, atol=1e-5)
    assert features.truncated == before + 4, "two of three, twice"
    shorter = features.encode_texts([" ".join(words[: context - 3])])
    assert (shorter - features.encode_texts([cut])).norm() > 1e-3, (
        "what is inside the context counts"
    )


def test_a_caption_does_not_depend_on_those_beside_it(features):
    captions = ["a red circle", "a small blue star to the left of a large green square", ""]
    together = features.encode_texts(captions)
    alone = torch.cat([features.encode_texts([caption]) for caption in captions])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert not together.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features.encode_texts(captions), together)


def test_no_captions_have_no_features_and_one_string_is_no_list(features):
    assert features.encode_texts([]).shape == (0, features.width)
    with pytest.raises(TypeError, match="captions is a list"):
        features.encode_texts("a red circle")


def test_pixels_are_normalised_as_the_folder_says(features, tmp_path):
    """In the file of its own that models were published with, and in that of today's processors."""
    assert features.mean.flatten().tolist() == pytest.approx([255 * x for x in PIXEL_MEAN])
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    plain = ClipFeatures(copied(tmp_path / "plain", "preprocessor_config.json", **half))
    assert plain.mean.flatten().tolist() == [127.5] * 3
    assert plain.std.flatten().tolist() == [63.75] * 3
    assert plain.digest != features.digest
    nested = ClipFeatures(copied(tmp_path / "new", "processor_config.json", image_processor=half))
    assert nested.digest == plain.digest


def test_the_digest_changes_with_what_the_weights_do_not_show(features, tmp_path):
    config = json.loads((PACKAGED / "config.json").read_text())
    vision = config["vision_config"] | {"hidden_act": "gelu"}
    text = config["text_config"] | {"num_attention_heads": 2}
    digests = {
        features.digest,
        ClipFeatures(copied(tmp_path / "a", "config.json", vision_config=vision)).digest,
        ClipFeatures(copied(tmp_path / "b", "config.json", text_config=text)).digest,
    }
    assert len(digests) == 3
    assert ClipFeatures(name="clip_tiny").digest == features.digest
    assert ClipFeatures(name="clip_tiny").name == "clip_tiny"
    shutil.copytree(PACKAGED, tmp_path / "run" / "clip")
    assert ClipFeatures(str(tmp_path / "run")).digest == features.digest


def test_a_model_that_is_not_there_says_what_to_give():
    with pytest.raises(OSError, match=r"no CLIP model at '/no/such'"):
        ClipFeatures("/no/such")
