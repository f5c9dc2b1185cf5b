import pytest
import torch

from ldm.inference.generate import generate_in_batches
from ldm.utils.errors import UsageError


def test_images_of_nan_are_no_images():
    def paint(prompts, *, seeds, steps, on_step):
        return torch.full((len(prompts), 3, 2, 2), torch.nan)

    with pytest.raises(UsageError, match="the images are not finite"):
        generate_in_batches(paint, [("a", 0)], decode=None, steps=1, batch=1, quiet=True)
