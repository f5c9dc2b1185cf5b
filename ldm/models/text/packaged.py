"""The text encoder that comes with ldm, by torch alone: importing transformers takes seconds.

Shapes: B captions, L tokens, D text width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ldm.utils.files import PACKAGED_PREFIX, resolve_path

PACKAGED_CLIP = f"{PACKAGED_PREFIX}clip"


class PackagedTokenizer:
    """The tokenizer of the packaged CLIP, as transformers' CLIPTokenizer."""

    def __init__(self, file: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(file))
        self.eos_token_id = self.pad_token_id = self.tokenizer.token_to_id("<|endoftext|>")

    def __call__(self, texts: Sequence[str], *, verbose: bool = False) -> dict:
        """Returns `input_ids`, from the start token to the end token of each text."""
        rows = self.tokenizer.encode_batch(list(texts))
        return {"input_ids": [row.ids for row in rows]}


class PackagedClipText(nn.Module):
    """CLIP's text transformer with the weights' names, outputs and bits of transformers' 5.

    Radford et al. 2021, section 2.4. config: the text part of a config.json.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        width = self.config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(self.config.vocab_size, width),
                "position_embedding": nn.Embedding(self.config.max_position_embeddings, width),
            }
        )
        layers = nn.ModuleList(ClipTextLayer(config) for _ in range(self.config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width, eps=self.config.layer_norm_eps)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.final_layer_norm.weight.dtype

    def forward(self, input_ids: Tensor, *, output_hidden_states: bool = False) -> SimpleNamespace:
        """Ids (B, L) -> `last_hidden_state` (B, L, D), and `pooler_output` (B, D): the end's.

        `hidden_states` are those before the first layer and after each, without the final norm.
        """
        places = self.embeddings["position_embedding"].weight[: input_ids.shape[1]]
        x = self.embeddings["token_embedding"](input_ids) + places
        states = [x]
        for layer in self.encoder["layers"]:
            x = layer(x)
            if output_hidden_states:
                states.append(x)
        x = self.final_layer_norm(x)
        ends = (input_ids == self.config.eos_token_id).int().argmax(dim=1)  # (B,)
        pooled = x[torch.arange(len(x), device=x.device), ends]
        return SimpleNamespace(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


class ClipTextLayer(nn.Module):
    """Causal self-attention and an MLP; pre-norm."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        names = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        inner = config["intermediate_size"]
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        x = x + self.self_attn["out_proj"](y.transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))  # "quick GELU"


def load_packaged_clip_text() -> tuple[PackagedClipText, nn.Linear, PackagedTokenizer]:
    """The text half of the packaged CLIP, its projection, and its tokenizer."""
    folder = resolve_path(PACKAGED_CLIP)
    config = json.loads((folder / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):  # the denoiser's weights are drawn next
        model = PackagedClipText(config["text_config"])
        project = nn.Linear(model.config.hidden_size, config["projection_dim"], bias=False)
    weights = load_file(folder / "model.safetensors")
    project.load_state_dict({"weight": weights["text_projection.weight"].float()})
    part = "text_model."
    text = {name: tensor.float() for name, tensor in weights.items() if name.startswith(part)}
    text = {name.removeprefix(part): tensor for name, tensor in text.items()}
    model.load_state_dict(text)
    return model, project, PackagedTokenizer(folder / "tokenizer.json")
