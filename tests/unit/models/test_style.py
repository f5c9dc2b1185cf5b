"""Style pictures: what their encoder keeps, and that the network is as before until it is told."""

from dataclasses import replace

import pytest
import torch
from world import CAPTIONS, SIZE, latent_diffusion, shapes_data, unet, val_batch

from ldm.diffusion.conditioning import Condition
from ldm.models.diffusers_settings import export_unet_config
from ldm.models.style import ClipStyleEncoder, shuffle_tiles
from ldm.models.unet import UNet
from ldm.models.warm_start import warm_start
from ldm.utils.checkpoint_file import CheckpointError

WORDS = ["striped", "flat", "both", "drawn", "oil on canvas", "oil"]
SIZES = {
    "channels": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "heads": 2,
    "groups": 8,
    "positional_waves": 2,
}
SIZES |= {"in_channels": 3, "out_channels": 3, "pooled_dim": 5, "attention": (True, True)}


def network(*, context_dim=12, style_dim=6, style_code=8, seed=0) -> UNet:
    """No parameter that a network without style has is at a zero that would hide a mistake."""
    torch.manual_seed(seed)
    net = UNet(context_dim=context_dim, style_dim=style_dim, style_code=style_code, **SIZES)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith(net.extension_prefixes or ("none",)):
                parameter += 0.05 * torch.randn(parameter.shape)
    return net


def question(*, context_dim=12, style_dim=6, batch=3) -> tuple:
    torch.manual_seed(1)
    tokens = torch.randn(batch, 7, context_dim) if context_dim else None
    style = torch.randn(batch, 9, style_dim)
    cond = Condition(tokens=tokens, pooled=torch.randn(batch, 5), style=style)
    return torch.randn(batch, 3, 8, 8), torch.linspace(3, 990, batch), cond


def without(cond: Condition) -> Condition:
    return Condition(tokens=cond.tokens, pooled=cond.pooled)


@pytest.mark.parametrize("context_dim", [12, 0])
@torch.no_grad()
def test_begins_as_the_network_without_style_bit_for_bit(context_dim):
    source, net = network(context_dim=context_dim, style_dim=0), network(context_dim=context_dim)
    assert source.extension_prefixes == ()
    warm_start(net, {k: 2 * v for k, v in source.state_dict().items()}, source="x")
    warm_start(source, {k: 2 * v for k, v in source.state_dict().items()}, source="x")
    x, t, cond = question(context_dim=context_dim)
    assert torch.equal(net(x, t, cond), source(x, t, without(cond)))
    assert source(x, t, cond).std() > 0.01
    with pytest.raises(CheckpointError, match="unknown here"):
        warm_start(source, net.state_dict(), source="x")


def trained(net: UNet) -> UNet:
    """With nothing at zero any more."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return net.eval()


@torch.no_grad()
def test_an_image_without_style_is_as_if_there_were_none():
    """Once trained as well, and whatever the others of its batch have."""
    net = trained(network())
    x, t, cond = question()
    style = cond.style * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    some = net(x, t, Condition(tokens=cond.tokens, pooled=cond.pooled, style=style))
    none, all_ = net(x, t, without(cond)), net(x, t, cond)
    torch.testing.assert_close(some[1], none[1])
    torch.testing.assert_close(some[[0, 2]], all_[[0, 2]])
    assert (all_ - none).flatten(1).abs().amax(1).min() > 1e-3


def test_style_learns_from_the_first_step_on():
    net = network()
    x, t, cond = question()
    net(x, t, cond).square().mean().backward()
    moved = [n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    ways = [name for name in moved if name.startswith(net.extension_prefixes)]
    assert "style.to_emb.weight" in ways
    assert sum("style_attn.attn.to_out" in name for name in ways) == 7  # of 2 + 1 + 4 transformers


@torch.no_grad()
def test_a_style_code_has_few_values_and_noise_only_in_training():
    """What is told depends on them alone; so they must be of a scale, or noise would be none."""
    tokens, seen = trained(network(style_code=3)).style, []
    tokens.to_code.register_forward_hook(lambda _, args, code: seen.append(code))
    _, _, cond = question()
    tokens(100 * cond.style)
    assert seen[0].shape == (3, 3)
    torch.testing.assert_close(seen[0].square().mean(1), torch.ones(3), rtol=0.05, atol=0)
    tokens.to_code.register_forward_hook(lambda _, args, code: seen[0][[0, 0, 1]])
    told = tokens(cond.style)[0]
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[1], told[2])
    assert torch.equal(tokens(cond.style)[0], told)
    assert not torch.equal(tokens.train()(cond.style)[0], told)


def test_refuses_features_of_another_encoder():
    x, t, cond = question(style_dim=4)
    with pytest.raises(ValueError, match=r"cond\.style for 3 images, 6 wide"):
        network()(x, t, cond)
    with pytest.raises(ValueError, match="style_dim must be 0"):
        export_unet_config(network())


@pytest.fixture
def folder(tiny_clip, tmp_path):
    tiny_clip.save(tmp_path / "clip")
    return str(tmp_path / "clip")


def draws(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def pictures(n=4):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_tiles_change_places_and_stay_whole():
    images = torch.arange(2 * 3 * 64.0).reshape(2, 3, 8, 8)
    mixed = shuffle_tiles(images, 2, draws(2))
    assert not torch.equal(mixed, images)
    for image, other in zip(images, mixed, strict=True):
        quarters = [
            {tuple(one[:, y : y + 4, x : x + 4].flatten().tolist()) for y in (0, 4) for x in (0, 4)}
            for one in (image, other)
        ]
        assert quarters[0] == quarters[1]
    assert torch.equal(shuffle_tiles(images, 1, draws(2)), images)


def test_features_depend_on_an_images_own_numbers(folder):
    encoder = ClipStyleEncoder(folder, tiles=2)
    images = pictures()
    together = encoder(images, draws(4))
    assert together.shape == (4, (SIZE // 8) ** 2, encoder.width)
    alone = encoder(images[2:3], draws(1, seed=2))
    torch.testing.assert_close(alone[0], together[2])
    assert not torch.equal(encoder(images, draws(4, seed=9)), together)
    whole = ClipStyleEncoder(folder, tiles=1)
    assert torch.equal(whole(images, draws(4)), whole(images, draws(4, seed=9)))


def test_colours_change_only_in_training(folder):
    plain, encoder = (
        ClipStyleEncoder(folder, tiles=1),
        ClipStyleEncoder(folder, tiles=1, recolour=True),
    )
    images = pictures()
    assert torch.equal(encoder(images, draws(4)), plain(images, draws(4)))
    found = encoder(images, draws(4), training=True)
    turned = {
        tuple(order)
        for order in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist()
        for each in (plain(images[:, order], draws(4)),)
        for i in range(4)
        if torch.equal(each[i], found[i])
    }
    assert len(turned) > 1
    assert all(sorted(order) == [0, 1, 2] for order in turned)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(encoder(grey, draws(4), training=True), plain(grey, draws(4)))


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("a heart above a star, striped, on navy", "a heart above a star, on navy"),
        ("on navy, a heart above a star, both flat", "on navy, a heart above a star"),
        ("Striped shapes on navy: a heart", "shapes on navy: a heart"),
        ("a heart, drawn flat on navy", "a heart, on navy"),
        ("a flatfish, oil on canvas", "a flatfish"),
        ("", ""),
    ],
)
def test_style_words_are_removed_from_captions(folder, said, left):
    encoder = ClipStyleEncoder(folder, style_words=WORDS, word_dropout=0.5)
    assert encoder.strip_style_words(said) == left
    assert encoder.drop_style_words([said] * 2, torch.tensor([0.49, 0.5])) == [left, said]
    assert ClipStyleEncoder(folder, word_dropout=1.0).drop_style_words([said], torch.zeros(1)) == [
        said
    ]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tiles": 3}, "must divide the 16 pixels"),
        ({"tiles": 0}, "must divide"),
        ({"layer": 2}, "has 1 blocks"),
        ({"layer": -1}, "has 1 blocks"),
        ({"code": 1}, "takes 2 numbers or more"),
        ({"dropout": 1.5}, "style_encoder.dropout is a share"),
        ({"word_dropout": -0.1}, "style_encoder.word_dropout is a share"),
    ],
)
def test_settings_out_of_range_are_refused(folder, wrong, told):
    with pytest.raises(ValueError, match=told):
        ClipStyleEncoder(folder, **wrong)


def test_training_drops_style_apart_from_captions(tiny_text, folder, shapes):
    """Each image by its own number; a validation drops neither, and hears every word."""
    encoder = ClipStyleEncoder(folder, dropout=0.5, word_dropout=1.0, style_words=["circle"])
    module = latent_diffusion(tiny_text, style_encoder=encoder, caption_dropout=0.5)
    batch = val_batch(shapes_data(shapes), range(10))
    heard = []
    module.components = replace(module.components, text_encoder=Listening(tiny_text, heard))
    _, cond = module.encode(batch)
    styled = cond.style.ne(0).any(2).any(1)
    null = tiny_text.null(1).tokens
    told = (cond.tokens != null).any(2).any(1)
    assert {(a, b) for a, b in zip(styled.tolist(), told.tolist(), strict=True)} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    assert heard == [[c.replace(" circle", "") for c in CAPTIONS]]
    _, again = module.encode({**batch, "position": batch["position"]})
    assert torch.equal(again.style, cond.style)
    _, cond = module.encode(batch, training=False)
    assert cond.style.ne(0).any(2).any(1).all()
    assert heard[-1] == CAPTIONS
    names = set(module.state_dict())
    assert not any("clip" in name or "vision" in name for name in names), "frozen, and not stored"


class Listening:
    """A text encoder that notes what it is given."""

    def __init__(self, text, heard):
        self.text, self.heard = text, heard
        self.null, self.truncated = text.null, 0

    def __call__(self, captions):
        self.heard.append(list(captions))
        return self.text(captions)


def test_a_model_without_style_gets_none(tiny_text, shapes):
    module = latent_diffusion(tiny_text)
    _, cond = module.encode(val_batch(shapes_data(shapes), range(4)))
    assert cond.style is None
    assert unet(tiny_text).extension_prefixes == ()
