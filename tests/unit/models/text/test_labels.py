"""No text, and labels: what they make of captions, and that all takes them as it takes a CLIP."""

import os
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from world import latent_diffusion, make_trainer, shapes_data, small_autoencoder, unet

from ldm.data.scenes.world import SHAPES, caption, sample_scene
from ldm.diffusion.conditioning import Condition, Conditioning
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.models.text.cached import CachedTextEncoder
from ldm.models.text.labels import LabelTextEncoder, NullTextEncoder
from ldm.models.unet import UNet
from ldm.utils.hashing import hash_module

NAMES = ["cat", "dog", "hot dog", "Großer Bär"]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("a cat and a dog", "cat"),
        ("a DOG with a cat", "dog"),
        ("a hot  dog", "hot dog"),
        ("concatenate the dogs, dog", "dog"),
        ("dog", "dog"),
        ("the GROSSER\nBÄR, and a cat", "Großer Bär"),
        ("cat's cradle", "cat"),
    ],
)
def test_a_caption_is_the_first_name_in_it(said, name):
    pooled = LabelTextEncoder(NAMES)([said]).pooled
    assert torch.equal(pooled, torch.eye(4)[[NAMES.index(name)]])


@pytest.mark.parametrize("said", ["a catt on a mat", "dogs", "cat_food"])
def test_a_caption_without_a_name_is_refused_with_the_nearest(said):
    nearest = "dog" if said == "dogs" else "cat"
    with pytest.raises(ValueError, match=f"{said}.*the nearest is '{nearest}'.*text_encoder.names"):
        LabelTextEncoder(NAMES)(["a cat", said])


@given(st.text(max_size=30))
def test_any_string_has_a_name_or_is_refused(said):
    labels, within = (
        LabelTextEncoder(NAMES),
        any(name.casefold() in said.casefold() for name in NAMES),
    )
    if not said.strip():
        assert labels.index(said) is None
    elif not within:
        with pytest.raises(ValueError, match="the nearest is"):
            labels.index(said)


def test_names_come_from_a_file_as_well(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n dog \nhot  dog\nGroßer Bär\n", encoding="utf-8")
    read = LabelTextEncoder(str(tmp_path / "names.txt"))
    assert read.names == NAMES
    assert hash_module(read) == hash_module(LabelTextEncoder(NAMES))
    assert hash_module(read) != hash_module(LabelTextEncoder(NAMES[::-1]))


@pytest.mark.parametrize(
    ("names", "match"), [([], "one name or more"), (["a", " "], "empty"), (["a", "A"], "'a' twice")]
)
def test_invalid_lists_of_names_are_refused(names, match):
    with pytest.raises(ValueError, match=match):
        LabelTextEncoder(names)


def test_names_from_a_device_or_a_pipe_are_not_waited_for(tmp_path):
    """A checkpoint may come from anyone, and /dev/zero took all memory."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(ValueError, match=f"{path} is no file"):
            LabelTextEncoder(path)
    began = time.monotonic()
    assert LabelTextEncoder([str(n) for n in range(50_000)]).pooled_width == 50_000
    assert time.monotonic() < began + 10


def test_every_caption_of_the_drawn_world_has_its_shape():
    labels = LabelTextEncoder(SHAPES)
    for i in range(300):
        scene, rng = sample_scene(i, split="val")
        assert SHAPES[labels.index(caption(scene, rng))] == scene.objects[0].shape


@pytest.mark.parametrize(
    "text", [NullTextEncoder(), LabelTextEncoder(NAMES)], ids=["none", "labels"]
)
def test_an_empty_caption_has_the_null_condition(text):
    empty, null = text(["", " \n"]), text.null(2)
    for a, b in zip(empty.parts(), null.parts(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert text.width == text.max_length == text.truncated == 0
    with pytest.raises(TypeError, match="not one string"):
        text("a cat")


@pytest.mark.parametrize(
    "text", [NullTextEncoder(), LabelTextEncoder(NAMES)], ids=["none", "labels"]
)
def test_their_conditions_can_be_concatenated_selected_and_cached(text):
    cond = text(["a dog", "a cat"])
    width = text.pooled_width
    both = text.null(2).cat(cond)
    mixed = cond.where(torch.tensor([True, False]), text.null(2))
    kept = CachedTextEncoder(text)
    twice = [kept(["a dog", "a cat", "a dog"]) for _ in range(2)]
    if not width:
        assert both == mixed == twice[0] == twice[1] == Condition()
        return
    assert both.pooled.sum(1).tolist() == [0, 0, 1, 1]
    assert mixed.pooled.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert all(torch.equal(one.pooled, cond.pooled[[0, 1, 0]]) for one in twice)


@torch.no_grad()
def test_without_text_guidance_changes_nothing():
    net, text = unet(NullTextEncoder()), NullTextEncoder()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])
    answers = [
        ClassifierFreeGuidance(scale=scale)(net, Conditioning(text(["a", "b"]), text.null(2)))(x, t)
        for scale in (1, 2, 7)
    ]
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_output_depends_on_the_label():
    torch.manual_seed(0)
    sizes = {"channels": 16, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    channels = {"in_channels": 3, "out_channels": 3}
    text = LabelTextEncoder(NAMES)
    net = UNet(**channels, **sizes, attention=(True,), context_dim=0, pooled_dim=text.pooled_width)
    for parameter in net.parameters():
        parameter += 0.03 * torch.randn(parameter.shape)
    x = torch.randn(1, 3, 8, 8).expand(3, 3, 8, 8)
    cat, dog, cat_again = net(x, torch.tensor(500.0), text(["a cat", "a dog", "Cat!"]))
    assert torch.equal(cat, cat_again)
    assert not torch.allclose(cat, dog, atol=1e-4)


def test_an_unconditional_model_learns(shapes):
    module = latent_diffusion(NullTextEncoder(), autoencoder=small_autoencoder(), lr=3e-3)
    data, trainer = shapes_data(shapes), make_trainer(steps=25)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/loss"] < 0.95 * before["val/loss"]
