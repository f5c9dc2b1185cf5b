"""Text encoders and tokenizers of small random pipelines, written by transformers."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.clip import train_tokenizer

LENGTH = 12
# The encoders of published pipelines, as their config.json files say.
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
SD1_TEXT = {**CLIP_L, "num_attention_heads": 12, "projection_dim": 768}
SD2_TEXT = {**OPENCLIP_H, "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512}
SDXL_TEXT = {**OPENCLIP_G, "num_attention_heads": 20, "hidden_act": "gelu"}
SDXL_TEXT |= {"projection_dim": 1280}
# What published config.json files say: the end token 2 stands for the largest id (transformers).
END = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def write_text_encoder(
    folder: Path,
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    suffix: str = "",
    projected: bool = False,
    length: int = LENGTH,
    **config: object,
) -> None:
    """Writes `text_encoder` and `tokenizer` of a pipeline; projected: with the projection."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(tokenizer)} | END | config
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    torch.manual_seed(seed)
    model = kind(CLIPTextConfig(**sizes, max_position_embeddings=length))
    with torch.no_grad():
        for weight in model.parameters():  # away from the tiny initial values, norms too
            weight.add_(0.8 * sizes["hidden_size"] ** -0.5 * torch.randn_like(weight))
    model.save_pretrained(folder / f"text_encoder{suffix}")
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")


def write_sdxl_text(folder: Path, tokenizer: CLIPTokenizer | None = None, *, seed: int = 0) -> Path:
    """Writes the text part of a small SDXL: `tokenizer_2` is in the layout of before 2023."""
    tokenizer = tokenizer or train_tokenizer(["a red heart above a blue star!"], vocab_size=540)
    write_text_encoder(folder, tokenizer, seed=seed)
    write_text_encoder(
        folder,
        tokenizer,
        seed=seed + 1,
        suffix="_2",
        hidden_size=24,
        num_hidden_layers=4,
        hidden_act="gelu",
        projected=True,
        projection_dim=20,
    )
    write_old_tokenizer(folder / "tokenizer_2", pad="!")
    return folder


def write_old_tokenizer(folder: Path, *, pad: str, length: int = LENGTH) -> None:
    """Rewrites a tokenizer as vocab.json and merges.txt that pad with `pad`, as SD 2.x and SDXL."""
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text())
    file.unlink()
    added = {each["content"]: each["id"] for each in parts["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(parts["model"]["vocab"] | added))
    merges = "\n".join(" ".join(pair) for pair in parts["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(words))
    settings = {"model_max_length": length, "tokenizer_class": "CLIPTokenizer", **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
