"""Every command of docs/coco_256.md, in its order, on a few photographs with small random parts.

The parts are in the published layout: an AutoencoderKL of diffusers and a CLIP of transformers.
"""

import re
import shlex
from pathlib import Path

import published_folders as folders
import pytest
import torch
from shell import ROOT, TRAIN, run
from transformers import CLIPConfig, CLIPModel

COCO = ROOT.parent / "shared" / "data" / "coco_mini"
DOWNLOADS = ("mkdir", "curl", "unzip")
VAE = ["autoencoder.path=vae", "autoencoder.channels=4", "autoencoder.multipliers=[1,2,2,2]"]
VAE += ["autoencoder.blocks=1", "autoencoder.groups=2"]
PARTS = [*VAE, "text_encoder.path=clip"]
IMAGES = ["features=[clip]", "features.clip.path=clip"]
BRIEF = {
    "ldm.prepare": ["limit=8", "workers=1"],
    "ldm.cache": [*PARTS, "batch=4", "workers=1", "device=cpu"],
    "train.py": [
        *PARTS,
        *IMAGES,
        *("model.channels=16", "model.groups=8", "model.heads=2", "model.multipliers=[1,2]"),
        *("model.attention=[false,true]", "data.batch_size=4", "data.workers=0"),
        *("samples.n=1", "samples.steps=1", "eval.images.count=8", "eval.images.steps=1"),
        *("eval.images.real=8", "trainer.val_check_interval=1", "logger=csv"),
    ],
    "ldm.evaluate": [*IMAGES, "count=8", "real=8", "steps=1", "batch=4", "device=cpu"],
    "ldm.compare": [],
}
STEPS = {"plan=true": 1, "trainer=ddp": 2, "trainer=gpu": 1}  # the second goes on with the first


def read_commands() -> list[list[str]]:
    """The commands of the page, without downloads."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/coco_256.md").read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.split()[0] in (*DOWNLOADS, "python", "torchrun") for line in lines)
    return [shlex.split(line) for line in lines if not line.startswith(DOWNLOADS)]


def shorten(words: list[str], cwd: Path) -> list[str]:
    """A command of the page for a processor, with small settings."""
    words = words[
        words.index("-m" if "-m" in words[:5] and "train.py" not in words else "python") :
    ]
    verb = words[1]
    given = {word.partition("=")[0] for word in BRIEF[verb]}
    rest = []
    for word in words[2:]:
        if word.endswith("/*"):
            rest += sorted(str(path.relative_to(cwd)) for path in cwd.glob(word) if path.is_dir())
        elif word.partition("=")[0] not in {*given, "trainer", "trainer.max_steps"}:
            rest.append(word.replace("trainer.devices=8", "trainer.devices=2"))
    if verb == "train.py":
        steps = next(n for word, n in STEPS.items() if word in words)
        brief = [*BRIEF[verb], "trainer=cpu", f"trainer.max_steps={steps}"]
        if "trainer=ddp" in words:
            brief += ["strategy=ddp"]
        return [TRAIN, *rest, *brief]
    return ["-m", verb, *rest, *BRIEF[verb]]


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder with the photographs, an autoencoder and a CLIP."""
    if not COCO.is_dir():
        pytest.skip("the photographs are not here")
    (tmp_path / "coco").symlink_to(COCO)
    torch.manual_seed(0)
    folders.autoencoder(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(tmp_path / "vae")
    tokenizer = folders.make_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    tower = sizes | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text | sizes, vision_config=tower, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path


@pytest.mark.slow
def test_the_page_runs_from_the_shards_to_the_comparison(home):
    said = {}
    for words in read_commands():
        said[" ".join(words)] = run(*shorten(words, home), cwd=home)
    plan, *_ = (text for line, text in said.items() if "plan=true" in line)
    assert "training images" in plan
    assert "hours" in plan
    sizes = {line: text for line, text in said.items() if "ldm.prepare" in line}
    assert all("8 samples in" in text for text in sizes.values())
    resumed, *_ = (text for line, text in said.items() if "trainer=ddp" in line)
    assert "resumes from step 1" in resumed
    assert "2 x cpu" in resumed
    assert "val/clip_score" in (home / "runs/coco_256/metrics.csv").read_text()
    assert (home / "runs/coco_256/curve_guidance.csv").is_file()
    assert (home / "evaluated/coco_256/metrics.json").is_file()
    assert len(list((home / "runs/coco_256_sweep").glob("*/result.json"))) == 2
    assert len(list((home / "generated/coco_256").glob("*.png"))) == 8
    assert (home / "compared/ranking.md").is_file()
