"""Two CLIP text encoders side by side, as Stable Diffusion XL uses them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ldm.diffusion.conditioning import Condition
from ldm.models.text.base import FrozenTextEncoder
from ldm.models.text.clip import ClipTextEncoder
from ldm.utils.files import resolve_path


class PairedTextEncoder(FrozenTextEncoder):
    """Two frozen CLIP text encoders: their states side by side, the second's projected end state.

    path: a diffusers pipeline folder with `text_encoder`, `tokenizer`, `text_encoder_2` and
    `tokenizer_2`, or its name on the hub. Each tokenizer pads with its own token. layer: as in
    `ClipTextEncoder`, without the final norm; -2 is diffusers' default, -3 its clip_skip=1.
    zero_empty: no text is all zeros, and not the empty caption (force_zeros_for_empty_prompt).
    Podell et al. 2023, SDXL, section 2.1.
    """

    def __init__(self, path: str, *, layer: int = -2, zero_empty: bool = True) -> None:
        folder = resolve_path(path)
        if folder.is_dir() and not (folder / "text_encoder_2").is_dir():
            raise ValueError(
                f"{path} has no text_encoder_2: text_encoder=sdxl reads a pipeline folder with two "
                "text encoders; for one, take text_encoder=clip"
            )
        first = ClipTextEncoder(f"{path}/text_encoder", layer=layer, norm=False)
        second = ClipTextEncoder(
            f"{path}/text_encoder_2", pooled=True, projected=True, layer=layer, norm=False
        )
        if first.max_length != second.max_length:
            raise ValueError(
                f"the text encoders in {path} read {first.max_length} and {second.max_length} "
                "tokens: only two of one length go side by side"
            )
        super().__init__(nn.ModuleDict({"first": first, "second": second}), first.tokenize)
        self.width = first.width + second.width
        self.pooled_width = second.pooled_width
        self.zero_empty = zero_empty
        # A part of the state, so that the digests of two choices differ.
        pads = [each.tokenize.tokenizer.pad_token_id for each in (first, second)]
        self.register_buffer("settings", torch.tensor([zero_empty, *pads]))

    def forward(self, captions: Sequence[str]) -> Condition:
        """Returns the tokens (B, L, D + D') and the second encoder's `pooled` (B, P)."""
        first, second = (encode(captions) for encode in self.model.values())
        return Condition(torch.cat([first.tokens, second.tokens], -1), pooled=second.pooled)

    def encode_null(self) -> Condition:
        """Returns the condition (1, ..) of no text: zeros, or the empty caption's."""
        null = self([""])
        return null.map(torch.zeros_like) if self.zero_empty else null

    def save(self, folder: Path) -> None:
        """Writes the four folders of a pipeline, a folder for `path`."""
        for encoder, suffix in zip(self.model.values(), ("", "_2"), strict=True):
            encoder.save_parts(folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}")
