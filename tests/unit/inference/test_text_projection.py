"""Keys and values of the text: once a sampling process, and only in the network that made them."""

from dataclasses import replace

import pytest
import torch
from world import SIZE, pipeline

from ldm.diffusion.guidance.cfg import Autoguidance, ClassifierFreeGuidance

CALL = {"seeds": [0, 1], "size": SIZE, "steps": 4}
PROMPTS = ["a red circle", "a blue square"]


def count_calls(module) -> list:
    calls = []
    module.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    return calls


def find_text_layer(denoiser):
    return next(m.cross_attn.to_k for m in denoiser.modules() if getattr(m, "cross_attn", None))


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (ClassifierFreeGuidance(scale=3.0), [4]),
        (ClassifierFreeGuidance(scale=3.0, interval=(0.4, 0.9)), [2, 4]),
        (ClassifierFreeGuidance(scale=1.0), [2]),
    ],
)
def test_they_are_computed_once_a_run(tiny_text, guidance, rows):
    pipe = replace(pipeline(tiny_text), guidance=guidance)
    calls = count_calls(find_text_layer(pipe.components.denoiser))
    pipe(PROMPTS, **CALL)
    assert sorted(calls) == rows
    pipe(PROMPTS, **CALL)
    assert sorted(calls) == sorted(rows * 2), "another run has texts of its own"


def test_a_denoiser_without_them_gives_the_same_images(tiny_text):
    pipe = pipeline(tiny_text, scale=3.0)
    denoiser = pipe.components.denoiser

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = denoiser
            self.multiple, self.in_channels = denoiser.multiple, denoiser.in_channels

        def forward(self, x, t, cond):
            assert cond.projected is None
            return self.net(x, t, replace(cond, copies=1))

    foreign = pipe.replace_components(denoiser=Foreign())
    expected, got = pipe(PROMPTS, **CALL), foreign(PROMPTS, **CALL)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_network_that_guides_does_not_get_those_of_the_other(tiny_text):
    seen = []

    def guide(x_t, t, cond, network_timestep):
        seen.append(cond.projected)
        return torch.zeros_like(x_t)

    inner = ClassifierFreeGuidance(scale=3.0)
    pipe = replace(pipeline(tiny_text), guidance=Autoguidance(guide=guide, inner=inner))
    pipe(PROMPTS, **CALL)
    assert seen == [None] * 4
