import pytest
import torch
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.deferred_encoders import DeferredAutoencoder, DeferredModule, DeferredTextEncoder
from ldm.utils.hashing import hash_module

SIZES = {"channels": 8, "multipliers": (1, 1), "blocks": 1, "groups": 1, "attention": False}


def make_autoencoder():
    torch.manual_seed(5)
    made = AutoencoderKL(latent_channels=3, **SIZES)
    made.set_scale(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 1.0, 0.5]))
    return made.eval()


def defer(build, digest):
    deferred = DeferredModule(build, digest=digest, name="autoencoder")
    sizes = {"shift": [0.1, 0.2, 0.3], "scale": [2.0, 1.0, 0.5]}
    return DeferredAutoencoder(deferred, channels=3, factor=2, **sizes)


def test_an_autoencoder_is_built_where_it_decodes_and_freed(monkeypatch):
    real, built = make_autoencoder(), []
    digest = hash_module(real)

    def build():
        built.append(torch.rand(3))  # draws, as the weights of a new network
        return make_autoencoder()

    deferred = defer(build, digest)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        moments = real.posterior(images)
        latents = deferred.encode_moments(*moments, generator=generators)
        again = [torch.Generator().manual_seed(i) for i in range(2)]
        assert torch.equal(latents, real.encode(images, generator=again))
        means = deferred.encode_moments(moments[0], None, generator=None)
        assert torch.equal(means, real.encode(images))
        assert not built
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        decoded = deferred.decode(latents)
        assert torch.equal(torch.rand(2), expected)  # the training's numbers are what they were
        assert torch.equal(decoded, real.decode(latents))
        deferred.decode(latents)
    assert len(built) == 1
    deferred.deferred.release()
    assert deferred.deferred.module is None
    assert not list(deferred.parameters())
    torch.testing.assert_close(deferred.encode(images), real.encode(images))
    assert len(built) == 2


def test_an_autoencoder_with_other_weights_is_refused():
    deferred = defer(make_autoencoder, "0" * 64)
    with pytest.raises(ValueError, match=r"other weights than the autoencoder that the cache was"):
        deferred.decode(torch.zeros(1, 3, 4, 4))


class CountedText(nn.Module):
    truncated, calls = 0, 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, captions):
        CountedText.calls += 1
        lengths = torch.tensor([[float(len(text))] for text in captions])
        return Condition(tokens=lengths[:, None].expand(-1, 2, 3), pooled=lengths)


def test_prompts_are_encoded_once():
    CountedText.calls = 0
    deferred = DeferredModule(CountedText, digest=hash_module(CountedText()), name="text_encoder")
    null = {"tokens": torch.full((1, 2, 3), 7.0).bfloat16(), "pooled": torch.zeros(1, 1)}
    text = DeferredTextEncoder(deferred, width=3, pooled_width=1, max_length=2, null=null)
    assert torch.equal(text.null(4).tokens, torch.full((4, 2, 3), 7.0))
    assert text.null(2).mask is None
    assert CountedText.calls == 0
    first = text(["a", "bcd"])
    deferred.release()
    again = text(["bcd", "a"])
    assert torch.equal(first.tokens.flip(0), again.tokens)
    assert CountedText.calls == 1
    assert deferred.module is None
