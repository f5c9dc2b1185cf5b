"""Frozen text encoders: captions to the states that a denoiser attends to.

Shapes: B captions, L tokens (`max_length`), D text width, P pooled width.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ldm.diffusion.condition import Condition
from ldm.files import located
from ldm.models.whitening import FILE, Whitening

Model = TypeVar("Model", CLIPTextModel, CLIPModel)


class CaptionTokenizer:
    """Captions to token ids of one fixed length, the way published CLIP weights were trained.

    A row is the begin token, the words, the end token, then padding (CLIP pads with the end token).
    A caption that is too long loses its last words and keeps both ends, because CLIP reads its
    summary off the end token. `seen` counts the captions so far, `truncated` those that were cut.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_length: int) -> None:
        tokenizer.model_max_length = max_length  # diffusers pads to it in a saved folder
        self.tokenizer, self.max_length = tokenizer, max_length
        self.seen = self.truncated = 0

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, L), int64, on the CPU; any string is accepted, also half an emoji.

        Raises TypeError where `captions` is one string, which would read as a list of letters.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions is a list, not one string: write [{captions[:40]!r}]")
        # A lone surrogate (a cut emoji, an undecodable argument) has no UTF-8 and becomes "?".
        texts = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        self._count([len(row) for row in rows], texts)
        return torch.tensor([self._fit(row) for row in rows])

    def _fit(self, row: list[int]) -> list[int]:
        if len(row) > self.max_length:
            return [*row[: self.max_length - 1], self.tokenizer.eos_token_id]
        return row + [self.tokenizer.pad_token_id] * (self.max_length - len(row))

    def _count(self, lengths: list[int], texts: list[str]) -> None:
        long = [i for i, length in enumerate(lengths) if length > self.max_length]
        if long and not self.truncated:
            warnings.warn(
                f"a caption of {lengths[long[0]]} tokens is cut to {self.max_length}: "
                f"{texts[long[0]][:60]!r}... Put what matters first, or take a text encoder with a "
                "larger max_length. Said once; .truncated counts.",
                stacklevel=3,
            )
        self.seen += len(lengths)
        self.truncated += len(long)


class ClipText(nn.Module):
    """A frozen CLIP text encoder with its own tokenizer, as Stable Diffusion 1.x uses it.

    `path` is a folder with a CLIPTextModel or a whole CLIPModel and its tokenizer, a diffusers
    pipeline folder, a run directory with `clip/`, `packaged:clip` (comes with ldm), or the name of
    a CLIP model on the hub.
    `width` is D and `max_length` is L; `pooled_width` is P, 0 unless `pooled`. Pooled states are
    whitened where the folder says how, as those that `train.py` writes do.
    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", 3.3.
    Raises what `load_clip` and `Whitening.load` raise.
    """

    def __init__(self, path: str, *, pooled: bool = False) -> None:
        super().__init__()
        self.model, tokenizer = load_clip(CLIPTextModel, path)
        self.model.requires_grad_(False).eval()
        self.width = self.model.config.hidden_size
        self.pooled_width = self.width if pooled else 0
        folder = _places(located(path))[0]
        whitened = pooled and (folder / FILE).is_file()
        self.whiten = Whitening.load(folder, width=self.width) if whitened else nn.Identity()
        self.max_length = self.model.config.max_position_embeddings
        self.tokenize = CaptionTokenizer(tokenizer, self.max_length)
        self._null: dict[tuple[torch.device, torch.dtype], Condition] = {}

    @property
    def seen(self) -> int:
        """The number of captions encoded so far."""
        return self.tokenize.seen

    @property
    def truncated(self) -> int:
        """The number of captions so far that were cut to `max_length` tokens."""
        return self.tokenize.truncated

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Condition:
        """The states after the last LayerNorm; if asked, that at the end token is `pooled`.

        `mask` is None: published denoisers were trained to attend to the padding as well.
        """
        ids = self.tokenize(captions).to(self.model.device)  # (B, L)
        out = self.model(input_ids=ids)
        pooled = self.whiten(out.pooler_output) if self.pooled_width else None  # (B, P)
        return Condition(tokens=out.last_hidden_state, pooled=pooled)  # (B, L, D)

    def null(self, n: int) -> Condition:
        """The empty caption's condition `n` times: encoded once, then kept and expanded."""
        key = (self.model.device, self.model.dtype)
        if key not in self._null:
            # First asked for under inference_mode (a validation), it must still serve in training.
            with torch.inference_mode(False):
                self._null[key] = self([""])
        return self._null[key].map(lambda part: part.expand(n, *part.shape[1:]))

    def train(self, mode: bool = True) -> "ClipText":
        """Stays in eval mode whatever the module around it is told."""
        return super().train(False)


def load_clip(kind: type[Model], path: str) -> tuple[Model, CLIPTokenizer]:
    """A CLIP model in float32 with its tokenizer, from a folder or by its name on the hub.

    A folder is never looked up on the hub, and no pickle is executed.
    Raises OSError where there is no such model or its files cannot be read, and ValueError where
    the weights or the tokenizer do not belong to the model.
    """
    folder = located(path)
    local = folder.is_dir()
    model_at, tokenizer_at = _places(folder) if local else (path, path)
    # The model first: without a network a hub name fails here within seconds, while the tokenizer
    # retries for minutes and then comes back empty.
    try:
        model = _load_model(kind, model_at, local=local)
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"no CLIP model at '{path}': {error}\nGive a folder with config.json, "
            "model.safetensors and tokenizer.json (or vocab.json and merges.txt), a diffusers "
            "pipeline folder, a run directory with clip/, or the name of a model on huggingface.co."
        ) from error
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_at, local_files_only=local)
    vocab_size = model.config.get_text_config().vocab_size
    # transformers makes an empty tokenizer of missing files without a word.
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in '{tokenizer_at}' has {len(tokenizer)} tokens, the model's embedding "
            f"{vocab_size}: put the model's own tokenizer.json (or vocab.json and merges.txt) there"
        )
    return model, tokenizer


def _load_model(kind: type[Model], place: Path | str, *, local: bool) -> Model:
    with quiet():
        model, report = kind.from_pretrained(
            place,
            local_files_only=local,
            weights_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # told below: transformers tells in the silenced table
            output_loading_info=True,
        )
    # transformers leaves what the file lacks at random values.
    misfits = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if misfits:
        raise ValueError(
            f"the weights in '{place}' are not those of the {kind.__name__} in its config.json: "
            f"{len(misfits)} parameters are missing or of another shape, such as {min(misfits)}"
        )
    return model


def _places(folder: Path) -> tuple[Path, Path]:
    """Where a model and its tokenizer lie in a folder: pipeline, run directory, or plain."""
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    if (folder / "clip").is_dir():
        folder = folder / "clip"
    return folder, folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its table of weights that one half of a CLIP does not use."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
