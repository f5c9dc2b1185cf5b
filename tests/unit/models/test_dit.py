"""MMDiT against diffusers' SD3Transformer2DModel on random weights, and its own promises."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.models.compilation import compile_network
from ldm.models.dit import MMDiT
from ldm.models.dit_names import convert_to_sd3, export_sd3_config
from ldm.models.lora import select_lora_targets
from ldm.models.warm_start import warm_start

SMALL = {"width": 32, "depth": 3, "heads": 4}


def small(*, in_channels=4, context_dim=12, pooled_dim=6, **changes) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"context_dim": context_dim, "pooled_dim": pooled_dim}
    net = MMDiT(in_channels=in_channels, out_channels=3, **sizes, **(SMALL | changes))
    return randomise(net)


def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter, so that none is at an initial value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def inputs(net: MMDiT, *, batch=2, height=8, width=8) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    x = torch.randn(batch, net.in_channels, height, width)
    t = torch.linspace(990.3, 3.21, batch)
    tokens = torch.randn(batch, 7, net.context_dim) if net.context_dim else None
    pooled = torch.randn(batch, net.pooled_dim) if net.pooled_dim else None
    return x, t, Condition(tokens=tokens, pooled=pooled)


def hide_last(cond: Condition, count: int) -> Condition:
    mask = torch.ones(cond.tokens.shape[:2], dtype=torch.bool)
    mask[:, -count:] = False
    return replace(cond, mask=mask)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (6, 10)])
@torch.no_grad()
def test_same_as_stable_diffusion_3(size, qk_norm):
    net = small(qk_norm=qk_norm)
    oracle = SD3Transformer2DModel(**export_sd3_config(net, positions=16)).eval()
    oracle.load_state_dict(convert_to_sd3(net, positions=16))
    x, t, cond = inputs(net, height=size[0], width=size[1])
    assert_close_to_oracle(net(x, t, cond), oracle(x, cond.tokens, cond.pooled, t).sample)


def assert_close_to_oracle(got: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_positions_of_stable_diffusion_3_have_an_offset_and_a_scale():
    """Those of a table of 16 x 16 for a grid of 5 x 5, as diffusers computes it."""
    net = small(position_offset=8, position_scale=5 / 16)
    settings = export_sd3_config(net, positions=16) | {"sample_size": 10}
    oracle = SD3Transformer2DModel(**settings).eval()
    state = convert_to_sd3(net, positions=16)
    del state["pos_embed.pos_embed"]
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["pos_embed.pos_embed"], [])
    x, t, cond = inputs(net, height=6, width=10)
    assert_close_to_oracle(net(x, t, cond), oracle(x, cond.tokens, cond.pooled, t).sample)


@torch.no_grad()
def test_comparison_notices_one_wrong_weight():
    net = small()
    x, t, cond = inputs(net)
    expected = net(x, t, cond)
    net.blocks[1].text.to_k.weight[0, 0] += 0.1
    assert (net(x, t, cond) - expected).abs().max() > 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled_dim": 0}, "needs text states and pooled text"),
        ({"style_dim": 5}, "style_dim must be 0"),
    ],
)
def test_a_network_that_diffusers_lacks_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        export_sd3_config(small(**changes), positions=16)


def test_starts_as_zero_with_a_gradient():
    net = MMDiT(in_channels=4, out_channels=3, context_dim=12, pooled_dim=6, **SMALL)
    out = net(*inputs(net))
    assert not out.any()
    (out - 1).square().sum().backward()
    assert net.proj_out.bias.grad.any()


@pytest.mark.parametrize("changes", [{}, {"pooled_dim": 0}, {"context_dim": 0}, {"style_dim": 5}])
def test_every_parameter_gets_a_gradient(changes):
    net = small(**changes)
    x, t, cond = inputs(net)
    if net.style_dim:
        cond = replace(cond, style=torch.randn(2, 4, 5))
    net(x, t, cond).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("pooled_dim", [0, 6])
@torch.no_grad()
def test_masked_tokens_have_no_influence(pooled_dim):
    net = small(pooled_dim=pooled_dim)
    x, t, cond = inputs(net)
    masked = hide_last(cond, 3)
    out = net(x, t, masked)
    other = masked.tokens.clone()
    other[:, -3:] = 100
    assert torch.equal(net(x, t, replace(masked, tokens=other)), out)
    short = replace(cond, tokens=cond.tokens[:, :-3])
    torch.testing.assert_close(net(x, t, short), out, rtol=0, atol=1e-5)
    assert (net(x, t, cond) - out).abs().max() > 1e-3


@torch.no_grad()
def test_a_text_of_which_nothing_is_shown_is_finite():
    net = small(pooled_dim=0)
    x, t, cond = inputs(net)
    assert net(x, t, hide_last(cond, 7)).isfinite().all()


@torch.no_grad()
def test_pooled_tokens_and_time_each_matter():
    net = small()
    x, t, cond = inputs(net)
    out = net(x, t, cond)
    others = [replace(cond, pooled=cond.pooled + 1), replace(cond, tokens=cond.tokens.flip(2))]
    for changed in (net(x, t, others[0]), net(x, t, others[1]), net(x, t / 2, cond)):
        assert (changed - out).abs().max() > 1e-3


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    net = small()
    x, t, cond = inputs(net, batch=3)
    out = net(x, t, cond)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], cond.map(lambda part, i=i: part[i : i + 1]))
        torch.testing.assert_close(alone, out[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"context_dim": 0, "pooled_dim": 0}])
@torch.no_grad()
def test_one_timestep_is_for_the_whole_batch(changes):
    net = small(**changes)
    x, _, cond = inputs(net)
    every = net(x, torch.full((2,), 321.5), cond)
    torch.testing.assert_close(net(x, torch.tensor(321.5), cond), every, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_grid_is_not_square_and_its_sides_are_told_apart():
    net = small(patch=1)
    x, t, cond = inputs(net, height=3, width=7)
    out = net(x, t, cond)
    assert out.shape == (2, 3, 3, 7)
    assert (net(x.mT.contiguous(), t, cond).mT - out).abs().max() > 1e-3


@torch.no_grad()
def test_channels_last_changes_nothing():
    net = small()
    x, t, cond = inputs(net)
    expected = net(x, t, cond)
    net.to(memory_format=torch.channels_last)
    got = net(x.contiguous(memory_format=torch.channels_last), t, cond)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_autocast_keeps_tokens_between_blocks_in_float32():
    net = small()
    x, t, cond = inputs(net)
    kept = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, out: kept.append(out[0].dtype))
    expected, kept[:] = net(x, t, cond), []
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, cond)
    assert kept == [torch.float32] * 3
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_bfloat16_weights_run_without_autocast():
    net = small().bfloat16()
    x, t, cond = inputs(net)
    out = net(x.bfloat16(), t, cond.map(lambda part: part.bfloat16()))
    assert out.dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient_and_keeps_less():
    def run(net: MMDiT) -> tuple[list[Tensor], int]:
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(*inputs(net)).square().sum()
        stored = sum(kept)
        loss.backward()
        return [parameter.grad for parameter in net.parameters()], stored

    (plain, all_of_it), (again, rest) = run(small()), run(small(checkpointing="all"))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert rest < all_of_it / 3


def test_compiles_as_one_graph():
    net, plain = small(), small()
    compile_network(net, "default", report=lambda line: None, backend="eager")
    for batch, masked in ((2, False), (3, False), (2, True)):
        x, t, cond = inputs(net, batch=batch)
        cond = hide_last(cond, 2) if masked else cond
        torch.testing.assert_close(net(x, t, cond), plain(x, t, cond), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_widened_network_ignores_its_new_channels_and_style_at_first():
    one, wide = small().double(), small(in_channels=7, style_dim=5).double()
    for name in wide.extension_prefixes:
        part = wide.get_submodule(name[:-1])
        for last in ("attn.to_out", "to_emb"):
            if last in dict(part.named_modules()):
                nn.init.zeros_(part.get_submodule(last).weight)
    told = warm_start(wide, one.state_dict(), source="runs/first")
    assert told[0] == "3 input channels"
    x, t, cond = (inputs(one)[0].double(), *inputs(one)[1:])
    cond = cond.map(lambda part: part.double())
    more = {"concat": 100 * torch.randn(2, 3, 8, 8).double(), "style": torch.randn(2, 4, 5)}
    shown = replace(cond, **more).map(lambda part: part.double())
    torch.testing.assert_close(wide(x, t, shown), one(x, t, cond), rtol=0, atol=1e-12)


def test_adapters_reach_both_streams():
    net = small()
    names = select_lora_targets(net, "attention")
    assert len(names) == 3 * 4 + 2 * 4 + 2  # the last block's text has keys and values alone
    assert {"blocks.0.image.to_q", "blocks.2.text.to_v"} <= set(names)
    every = select_lora_targets(net, "all")
    assert set(names) < set(every)
    assert all(name.startswith("blocks.") for name in every)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "model.width=32 must be a multiple of model.heads=5 and of 4"),
        ({"heads": [4, 4, 4]}, "model.heads=.4, 4, 4. is one number for all blocks"),
        ({"checkpointing": [3]}, r"model.checkpointing has 3: give all, or some of \[0, 1, 2\]"),
        ({"temporal": True}, "takes images, not videos: take a UNet, as model=nano"),
    ],
)
def test_bad_construction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("height", "changes", "message"),
    [
        (7, {}, "latents of 7x8 do not fit patches of 2x2"),
        (8, {"pooled": None}, "needs cond.pooled for 2 images, 6 wide, got shape None"),
        (8, {"concat": torch.ones(2, 1, 8, 8)}, r"takes 4 channels, got 4 \+ 1"),
    ],
)
def test_bad_input_is_named(height, changes, message):
    net = small()
    x, t, cond = inputs(net, height=height)
    with pytest.raises(ValueError, match=message):
        net(x, t, replace(cond, **changes))
