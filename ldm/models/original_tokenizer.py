"""The tokenizer for a model in one file: that of CLIP, from a folder or the hub."""

from pathlib import Path

from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.hashing import hash_bytes
from ldm.utils.hub import download_snapshot

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


def find_tokenizer(path: Path) -> Path:
    """Returns the folder of a tokenizer: `tokenizer/` next to a file, else CLIP's of the hub.

    Raises CheckpointError or UsageError, with the remedy, where there is neither.
    """
    folder = path.parent / "tokenizer"
    if folder.is_dir():
        names = {file.name for file in folder.iterdir()}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise CheckpointError(
                f"{folder} has no tokenizer: put CLIP's tokenizer.json, or vocab.json and "
                "merges.txt, there"
            )
        return folder
    return download_snapshot(
        CLIP_TOKENIZER,
        TOKENIZER_FILES,
        subject=f"{path} holds no tokenizer, and {CLIP_TOKENIZER}",
        remedy=f"put CLIP's tokenizer.json, or vocab.json and merges.txt, into {folder}",
    )


def hash_tokenizer(folder: Path) -> str:
    """Returns a digest of a tokenizer's files."""
    files = [folder / name for name in TOKENIZER_FILES]
    return hash_bytes(*(file.read_bytes() for file in files if file.is_file()))


def save_tokenizer(source: Path, folder: Path, *, pad: str | None, length: int) -> None:
    """Writes a copy with this maximum length, and with `pad` as padding if it is a token."""
    from transformers import CLIPTokenizer  # slow to import

    from ldm.models.huggingface import silence_transformers

    with silence_transformers():
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.model_max_length = length
        if pad in tokenizer.get_vocab():
            tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
