"""An untrained T5 encoder of the smallest size, in the layout of a published one."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

SPECIAL = ["<pad>", "</s>", "<unk>"]


def save_tiny_t5(folder: Path, captions: Sequence[str], *, width: int = 16) -> Path:
    """A random encoder and a unigram tokenizer of these captions; the folder, for text_encoder=t5.

    As those that Google published, its embedding is longer than its vocabulary.
    """
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    vocab = [tuple(entry) for entry in json.loads(learner.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 5, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
