"""UNet against diffusers' UNet2DConditionModel on random weights, and its own promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idctn
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.models.diffusers_names import to_diffusers
from ldm.models.diffusers_settings import export_unet_config
from ldm.models.layers import timestep_embedding
from ldm.models.positional_map import PositionalMap
from ldm.models.random_layers import assign_image_positions, find_random_layers
from ldm.models.unet import UNet

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "heads": 2, "groups": 8}


def small(*, in_channels=4, context_dim=12, attention=(True, False), **changes) -> UNet:
    net = UNet(
        in_channels=in_channels,
        out_channels=3,
        context_dim=context_dim,
        attention=attention,
        **(SMALL | changes),
    )
    return randomise(net)


def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter, so that none is at an initial value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def inputs(net: UNet, *, batch=2, height=8, width=8) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    x = torch.randn(batch, net.in_channels, height, width)
    t = torch.linspace(990.3, 3.21, batch)  # not numbers of half precision
    tokens = torch.randn(batch, 7, net.context_dim) if net.context_dim else None
    pooled = torch.randn(batch, net.pooled_dim) if net.pooled_dim else None
    return x, t, Condition(tokens=tokens, pooled=pooled)


@pytest.mark.parametrize("width", [48, 64, 96, 160, 320])
def test_the_timestep_embedding_is_that_of_stable_diffusion_to_the_last_bit(width):
    t = torch.cat([torch.arange(1000.0), torch.rand(200) * 1000])
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, width), theirs)


@torch.no_grad()
def assert_same_as_diffusers(net: UNet, x: Tensor, t: Tensor, cond: Condition) -> None:
    with torch.device("meta"):
        oracle = UNet2DConditionModel(**export_unet_config(net))
    oracle.load_state_dict(to_diffusers(net.state_dict()), assign=True)
    expected = oracle.eval()(
        x, t, cond.tokens, class_labels=cond.pooled, encoder_attention_mask=cond.mask
    ).sample
    assert expected.std() > 0.01
    assert relative_error(net(x, t, cond), expected) < 1e-5


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 8)),
        (
            {
                "channels": 24,
                "multipliers": (2, 1, 3),
                "attention": (False, True, False),
                "blocks": 2,
                "heads": 4,
                "depth": 2,
            },
            (8, 12),
        ),
        ({"pooled_dim": 5}, (6, 4)),
        ({"pooled_dim": 5, "scale_shift": True, "embedding": 24}, (4, 6)),
    ],
    ids=["square", "deep-not-square", "pooled", "scale-shift"],
)
def test_same_as_diffusers(changes, size):
    net = small(**changes)
    assert_same_as_diffusers(net, *inputs(net, height=size[0], width=size[1]))


def test_comparison_notices_one_wrong_weight():
    net = small()
    x, t, cond = inputs(net)
    with torch.no_grad():
        expected = net(x, t, cond)
        net.down[0].attentions[0].layers[0].cross_attn.to_k.weight[0, 0] += 0.1
        assert relative_error(net(x, t, cond), expected) > 1e-5


@torch.no_grad()
def test_unconditional_is_the_same_network_without_cross_attention():
    net, unconditional = small(), small(context_dim=0)
    for name, parameter in net.named_parameters():
        if "cross_attn.to_out" in name:
            parameter.zero_()
    shared = unconditional.state_dict().keys()
    unconditional.load_state_dict({k: v for k, v in net.state_dict().items() if k in shared})
    x, t, cond = inputs(net)
    out = unconditional(x, t, Condition())
    assert torch.equal(out, net(x, t, cond))
    assert torch.equal(out, unconditional(x, t, cond))
    assert out.std() > 0.01


@pytest.mark.slow
def test_same_as_diffusers_at_full_size():
    net = randomise_full(UNet(in_channels=4, out_channels=4, context_dim=768))
    assert_same_as_diffusers(net, *inputs(net, batch=1))


def randomise_full(net: UNet) -> UNet:
    """Random values where a new network has zeros and ones; the rest is random already."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net.eval()


def test_defaults_are_stable_diffusion_in_size():
    with torch.device("meta"):
        net = UNet(in_channels=4, out_channels=4, context_dim=768)
    assert sum(parameter.numel() for parameter in net.parameters()) == 859_520_964


def test_starts_as_zero():
    net = UNet(in_channels=4, out_channels=3, context_dim=12, attention=(True, False), **SMALL)
    assert net(*inputs(net)).abs().max() == 0
    nn.init.ones_(net.conv_out.weight)
    assert net(*inputs(net)).std() > 0.1


NETS = {levels: small(multipliers=(1,) * levels, attention=(False,) * levels) for levels in (1, 3)}


@settings(max_examples=20, deadline=None)
@given(levels=st.sampled_from(sorted(NETS)), height=st.integers(1, 4), width=st.integers(1, 4))
def test_the_output_has_the_size_of_the_input(levels, height, width):
    net, multiple = NETS[levels], 2 ** (levels - 1)
    x, t, cond = inputs(net, height=height * multiple, width=width * multiple)
    with torch.no_grad():
        assert net(x, t, cond).shape == (2, 3, *x.shape[2:])


@torch.no_grad()
def test_masked_tokens_have_no_influence():
    net = small()
    x, t, cond = inputs(net)
    tokens = cond.tokens
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    other = torch.where(mask[:, :, None], tokens, 100.0)
    out = net(x, t, Condition(tokens, mask))
    assert torch.equal(out, net(x, t, Condition(other, mask)))
    assert relative_error(net(x[:1], t[:1], Condition(tokens[:1, :3])), out[:1]) < 1e-5
    assert relative_error(net(x, t, Condition(tokens)), out) > 1e-4


@torch.no_grad()
def test_pooled_and_tokens_each_matter():
    net = small(pooled_dim=5)
    x, t, cond = inputs(net)
    out = net(x, t, cond)
    for changed in (
        Condition(cond.tokens, None, -cond.pooled),
        Condition(-cond.tokens, None, cond.pooled),
    ):
        assert relative_error(net(x, t, changed), out) > 1e-3


@torch.no_grad()
def test_a_positional_map_is_a_cosine_transform():
    place = randomise(PositionalMap(5, 2, positional_waves=3))
    emb = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    weights = place.proj(emb).reshape(4, 3, 3, 2)
    low = weights.permute(0, 3, 1, 2).double().numpy()  # (B, C, positional_waves, positional_waves)
    spectrum = np.zeros((4, 2, 6, 8))
    spectrum[:, :, :3, :3] = low
    expected = idctn(spectrum, axes=(2, 3), norm="ortho") * np.sqrt(6 * 8)
    got = place(emb, (6, 8)).reshape(4, 6, 8, 2).permute(0, 3, 1, 2)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    assert place(emb, (1, 1)).shape == (4, 1, 2)


@torch.no_grad()
def test_only_positional_maps_depend_on_the_position():
    """In the middle, away from the border that convolutions feel."""
    for positional_waves, moved in ((0, False), (2, True)):
        net = small(
            positional_waves=positional_waves, multipliers=(1,), attention=(False,), pooled_dim=5
        )
        net.mid.attentions = nn.ModuleList()
        cond = inputs(net)[2].map(lambda part: part[:1])
        out = net(torch.zeros(1, 4, 40, 40), torch.tensor([9.0]), cond)[0, :, 18:22, 18:22]
        assert bool((out - out[:, :1, :1]).abs().max() > 1e-3) == moved


@torch.no_grad()
def test_concat_is_appended_to_the_input():
    net = small(in_channels=6)
    x, t, cond = inputs(net)
    split = Condition(cond.tokens, concat=x[:, 4:])
    assert torch.equal(net(x[:, :4], t, split), net(x, t, cond))


@torch.no_grad()
def test_one_timestep_is_for_the_whole_batch():
    net = small()
    x, _, cond = inputs(net)
    one = net(x, torch.tensor(500.5), cond)
    assert torch.equal(one, net(x, torch.tensor([500.5, 500.5]), cond))
    assert relative_error(net(x, torch.tensor(501.5), cond), one) > 1e-4


@torch.no_grad()
def test_channels_last_is_kept_and_changes_nothing():
    net = small()
    x, t, cond = inputs(net)
    expected = net(x, t, cond)
    out = net.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last), t, cond
    )
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_has_the_strides_of_its_weight(layout):
    """Otherwise DDP warns, and copies it to a place of other strides."""
    net = small().to(memory_format=layout)
    net(*inputs(net)).square().mean().backward()
    for name, weight in net.named_parameters():
        assert weight.grad.stride() == weight.stride(), name


def test_every_parameter_gets_a_gradient():
    net = small(pooled_dim=5, scale_shift=True, positional_waves=2)
    net(*inputs(net)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("levels", ["all", [0], [1]])
def test_checkpointing_changes_no_gradient_and_keeps_less(levels):
    def run(net: UNet) -> tuple[list[Tensor], int]:
        net.train()
        assign_image_positions(find_random_layers(net), 3, [5, 8])
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ):
            out = net(*inputs(net))
        gradients = torch.autograd.grad(out.square().mean(), list(net.parameters()))
        return [out, *gradients], sum(kept)

    sizes = {"dropout": 0.3, "scale_shift": True, "pooled_dim": 5, "positional_waves": 2}
    net, checkpointed = small(**sizes), small(**sizes, checkpointing=levels)
    checkpointed.load_state_dict(net.state_dict())
    plain, kept = run(net)
    again, kept_by_checkpoints = run(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_by_checkpoints < 0.8 * kept


def test_compiles_without_graph_breaks():
    net = small(pooled_dim=5, scale_shift=True, positional_waves=2)
    x, t, cond = inputs(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x, t, cond), net(x, t, cond)) < 1e-6


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        ((2, 3, 8, 8), Condition(torch.ones(2, 7, 12)), r"takes 4 channels, got 3 \+ 0"),
        (
            (2, 4, 8, 8),
            Condition(torch.ones(2, 7, 12), concat=torch.ones(2, 5, 8, 8)),
            r"takes 4 channels, got 4 \+ 5",
        ),
        ((2, 4, 8, 7), Condition(torch.ones(2, 7, 12)), "8x7 .* multiples of 2"),
        ((2, 4, 8, 8), Condition(), "cond.tokens for 2 images, 12 wide, got shape None"),
        ((2, 4, 8, 8), Condition(torch.ones(2, 7, 13)), r"got shape \(2, 7, 13\)"),
        ((2, 4, 8, 8), Condition(torch.ones(1, 7, 12)), r"got shape \(1, 7, 12\)"),
        ((2, 4, 8, 8), Condition(torch.ones(2, 7, 12)), "cond.pooled for 2 images, 5 wide"),
    ],
    ids=["channels", "concat", "size", "no-tokens", "width", "batch", "no-pooled"],
)
def test_bad_input_is_named(x, cond, message):
    net = small(pooled_dim=5)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(x), torch.tensor(0), cond)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (True,)}, "2 levels, but attention .* is for 1"),
        ({"heads": 3}, "cannot have 3 heads"),
        ({"positional_waves": -1}, "positional_waves must be 0"),
        ({"checkpointing": [0, 2]}, r"model.checkpointing has 2: give all, or some of \[0, 1\]"),
        ({"checkpointing": "some"}, "model.checkpointing has 'some': give all"),
    ],
)
def test_bad_construction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_keys_and_values_that_are_given_change_no_bit(masked):
    net = small(attention=(True, True))
    x, t, cond = inputs(net)
    if masked:
        cond = replace(cond, mask=torch.arange(7) < torch.tensor([[3], [7]]))
    projected = net.project_text(cond.tokens)
    assert torch.equal(net(x, t, replace(cond, projected=projected)), net(x, t, cond))
    other = replace(cond, tokens=torch.zeros_like(cond.tokens), projected=projected)
    assert torch.equal(net(x, t, other), net(x, t, cond)), "the text is read from them alone"


def test_a_network_without_text_has_no_keys_and_values():
    net = small(context_dim=0, pooled_dim=6)
    assert net.project_text(torch.zeros(2, 7, 12)) is None


@pytest.mark.parametrize("attention", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("changes", [{}, {"pooled_dim": 6}, {"scale_shift": True}])
@torch.no_grad()
def test_copies_of_an_image_share_the_layers_before_the_text(attention, changes):
    net = small(attention=attention, positional_waves=2, **changes)
    x, _, cond = inputs(net, batch=6)
    x = torch.cat([x[:2]] * 3)
    t, rows = torch.tensor(423.7), []
    plain = net(x, t, cond)
    net.conv_in.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    got = net(x, t, replace(cond, copies=3))
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)
    assert rows == ([6] if "pooled_dim" in changes else [2])


@pytest.mark.parametrize("times", ["of each image", "one"])
def test_copies_count_only_where_they_are_equal(times):
    """Style, no text, or times of their own: all rows go through all layers."""
    net = small(style_dim=5, temporal=True)
    x, t, cond = inputs(net)
    x = torch.cat([x[:1]] * 2)
    t = t if times == "of each image" else t[0]
    style = torch.randn(2, 3, 5) if times == "one" else None
    cond = replace(cond, style=style)
    with torch.no_grad():
        assert torch.equal(net(x, t, replace(cond, copies=2)), net(x, t, cond))
        video = x[:, :, None].expand(-1, -1, 3, -1, -1)
        assert torch.equal(net(video, t, replace(cond, copies=2)), net(video, t, cond))
    assert torch.isfinite(net(x, t, replace(cond, copies=2)).sum())


def test_the_feed_forward_is_the_same_with_and_without_a_backward_pass():
    net = small(attention=(True, True))
    x, t, cond = inputs(net)
    with torch.no_grad():
        plain = net(x, t, cond)
    assert torch.equal(net(x, t, cond), plain)
