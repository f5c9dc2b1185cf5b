"""The model card of a bundle: what the model is, how to use it, data, metrics, licence, files."""

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.experiments.ranking import iterate_leaves
from ldm.experiments.run_dir import find_run_of_checkpoint, read_metrics
from ldm.utils.bundle_file import BundleFiles, describe_bundle_files
from ldm.utils.files import read_json, write_text
from ldm.utils.images import load_png

CARD_FILE = "README.md"
SAMPLE_FILE = "samples.png"
METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says of a model."""

    name: str
    license: str | None
    parameters: int
    size: int
    num_frames: int | None
    step: int
    components: dict[str, dict]  # their settings, by group
    data: Sequence[str]  # where the training images are from

    def list_packages(self) -> list[str]:
        """The packages of its components other than ours."""
        leaves = dict(iterate_leaves(self.components))
        targets = {str(value) for key, value in leaves.items() if key.endswith("_target_")}
        return sorted({target.partition(".")[0] for target in targets} - {"ldm"})


def write_model_card(folder: Path, model: ModelFacts, ckpt: Path, known: BundleFiles) -> None:
    """Writes README.md, and copies samples and metrics of the run, if `ckpt` lies in one.

    known: the files of the bundle so far, with their digests.
    """
    run = find_run_of_checkpoint(ckpt)
    prompt, has_samples, metrics = "...", False, ""
    if run != Path():
        prompt, has_samples = copy_samples(run, folder)
        metrics = copy_metrics(run, folder, model.step)
    sections = [
        format_card_head(model),
        f"![samples of the training]({SAMPLE_FILE})" * has_samples,
        format_card_usage(model, prompt),
        format_card_training(model),
        metrics,
        format_card_files(describe_bundle_files(folder, known)),
        f"## Licence\n\n{model.license or 'None is stated: ask who gave you this model.'}",
    ]
    write_text(folder / CARD_FILE, "\n\n".join(filter(None, sections)) + "\n")


def copy_samples(run: Path, folder: Path) -> tuple[str, bool]:
    """Copies the newest samples of a run; returns their first prompt, and whether there are any."""
    # A link of a stranger's run may lead to any file here.
    paths = sorted(p for p in (run / "samples").glob("step=*.png") if not p.is_symlink())
    if not paths:
        return "...", False
    shutil.copyfile(paths[-1], folder / SAMPLE_FILE)
    prompts = load_png(paths[-1])[1].get("prompts") or ["..."]
    return str(prompts[0]), True


def format_card_head(model: ModelFacts) -> str:
    """The card's metadata, as the Hugging Face hub reads it, and one sentence on the model."""
    moving = model.num_frames is not None
    metadata = {
        "library_name": "ldm",
        "pipeline_tag": "text-to-video" if moving else "text-to-image",
        **({"license": model.license} if model.license else {}),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    kind = f"videos of {model.num_frames} frames" if moving else "images"
    return (
        "---\n" + "\n".join(lines) + f"\n---\n\n# {model.name}\n\n"
        f"A latent diffusion model of {model.parameters / 1e6:.1f} M parameters for {kind} of "
        f"{model.size} x {model.size} pixels, trained with ldm for {model.step} steps. "
        "These are the averaged weights (EMA)."
    )


def format_card_usage(model: ModelFacts, prompt: str) -> str:
    """Commands and Python code that use the model."""
    packages, shell_name = model.list_packages(), shlex.quote(model.name)
    word = f" trust=[{','.join(packages)}]" if packages else ""
    argument = f", trust={json.dumps(packages)}" if packages else ""
    return f"""\
## Use

```bash
ldm sample ckpt={shell_name}{word} prompt={shlex.quote(prompt)}
ldm evaluate ckpt={shell_name}{word}
ldm train init={shell_name}{word} name=my-run ...
```

```python
import ldm

pipe = ldm.load({json.dumps(model.name)}{argument})
images = pipe({json.dumps(prompt)}, seeds=[0, 1])
```"""


def format_card_training(model: ModelFacts) -> str:
    """The components, where the frozen ones are from, and the data with their digests."""
    rows = []
    for group, part in model.components.items():
        leaves = {key: value for key, value in iterate_leaves(part) if "_target_" not in key}
        words = [f"`{part['_target_']}`"]
        words += [f"{key}={shorten_place(str(value))}" for key, value in leaves.items()]
        rows.append(f"- {group}: {', '.join(words)}")
    rows += [f"- data: {line}" for line in model.data]
    return "\n".join(["## Training", "", *rows])


def shorten_place(place: str) -> str:
    """A place as a card names it, without the folders of this machine.

    A path below the working folder is relative to it. A file of the hub's cache has the model's
    name. Of any other absolute path the last two names stay.
    """
    path = Path(place)
    if not path.is_absolute():
        return place
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    if found := re.search(r"/models--(.+?)--([^/]+)/snapshots/[^/]+(.*)", place):
        return f"{found[1]}/{found[2]}{found[3]}"
    return "/".join(path.parts[-2:])


def copy_metrics(run: Path, folder: Path, step: int) -> str:
    """Copies what `ldm evaluate` measured of this step; returns it with the training's metrics."""
    last: dict[str, float] = {}
    for row in read_metrics(run):
        if row["step"] <= step:
            last |= {name: value for name, value in row.items() if name.startswith("val/")}
    lines = [f"- {k}: {v:.4g}" for k, v in last.items() if not k.startswith("val/loss_t")]
    path = run / METRICS_FILE
    facts = read_json(path) if path.is_file() and not path.is_symlink() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is not what ldm evaluate wrote: move it away")
    if facts.get("step") == step:
        try:
            lines += [f"- {name}: {value:.4g}" for name, value in facts["metrics"].items()]
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what ldm evaluate wrote: move it away") from error
        shutil.copyfile(path, folder / METRICS_FILE)
        lines.append(f"- {METRICS_FILE} says how the latter were measured")
    return "\n".join(["## Metrics", "", *lines]) if lines else ""


def format_card_files(files: BundleFiles) -> str:
    """Size and SHA-256 of each file so far."""
    rows = [f"| {name} | {facts['size']} | `{facts['sha256']}` |" for name, facts in files.items()]
    return "\n".join(["## Files", "", "| file | bytes | sha256 |", "| --- | --- | --- |", *rows])
