"""What is measured inside a run and after it, on runs of a few steps."""

import json
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import ClassVar

import peers
import pytest
import torch
from evaluated_runs import COLOURS, Home, asked, composed, measure
from PIL import Image
from shell import run, start, wait_for
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from world import CAPTIONS, shape

from ldm.cli.evaluate import VARIABLE_GROUPS, evaluate_points, format_scene_table
from ldm.config.combinations import pop_sweep_choices
from ldm.config.command_line import convert_to_usage_errors
from ldm.config.composition import CONF_DIR
from ldm.config.measurement import choose_source_kind
from ldm.data.image_decoding import ImageError
from ldm.data.shards.reader import ShardReader, write_shard
from ldm.evaluation.prompt_subset import PromptSubset
from ldm.evaluation.scenes.accuracy import METRIC_SUFFIXES, SCENE_METRICS
from ldm.experiments.curves import read_curves
from ldm.inference.pipeline import Pipeline
from ldm.models.text.clip import ClipTextEncoder
from ldm.training.job import TrainingJob
from ldm.utils.checkpoint_file import manifest_path, read_checkpoint, write_checkpoint
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_file

KEYS = [f"scene_{name}{suffix}" for suffix in METRIC_SUFFIXES for name in SCENE_METRICS]


class Colours:
    """A network that is quick: the mean colours of four corners, and as many numbers a caption."""

    name, width, digest = "colours", 12, "colours-1"
    pictures: ClassVar[list[tuple[int, ...]]] = []  # shapes of what it was shown
    captions: ClassVar[list[str]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.pictures += [tuple(image.shape) for image in images]
        cells = images.float().unflatten(-1, (2, -1)).unflatten(-3, (2, -1)).mean(dim=(-1, -3))
        return cells.flatten(1) / 255  # (n, 3, 2, 2) to (n, 12)

    def encode_texts(self, captions: list[str], *, device: torch.device | None = None) -> Tensor:
        self.captions += captions
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in captions]
        return torch.stack([torch.rand(self.width, generator=seed) for seed in seeds])


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    return Home(path)


@pytest.fixture(scope="module")
def measured(home) -> TrainingJob:
    """Three steps of two batches, each validated, every other one with pictures."""
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=1"]
    few = [
        "eval.scenes.count=3",
        "eval.scenes.steps=2",
        "eval.scenes.batch=4",
        "eval.scenes.every=2",
    ]
    return home.train("measured", *steps, "trainer.accumulate_grad_batches=2", *few)


def test_a_run_measures_every_so_often_and_at_its_end(home, measured):
    rows = home.rows("measured")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        there = row["step"] != "1"
        for key in KEYS:
            assert bool(row[f"val/{key}"]) == there, (row["step"], key)
            assert not there or 0 <= float(row[f"val/{key}"]) <= 1
    assert "val/scene_accuracy" in measured.trainer.callback_metrics  # for result.json


def test_the_averaged_weights_are_measured_as_they_are_now(measured):
    checks = [c for c in measured.trainer.callbacks if type(c).__name__ == "SceneAccuracy"]
    assert checks[0].pipeline.components.denoiser is measured.module.ema.module
    assert isinstance(checks[0].pipeline, Pipeline)


def test_measuring_leaves_the_training_as_it_is(home, measured):
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=1"]
    plain = home.train("plain", *steps, "trainer.accumulate_grad_batches=2", "eval=none")
    assert not any("scene" in key for key in home.rows("plain")[0])
    for name, tensor in measured.module.state_dict().items():
        assert torch.equal(tensor, plain.module.state_dict()[name]), name


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Twenty pictures in shards: val, train (the same in another order), and val in one file."""
    place = tmp_path_factory.mktemp("data")
    for name, parts in {
        "val": [range(12), range(12, 20)],
        "train": [range(19, -1, -1)],
        "copy": [range(20)],
    }.items():
        (place / name).mkdir()
        for i, part in enumerate(parts):
            samples = [
                (f"{n:04}", {"png": shape(n % 10), "txt": CAPTIONS[n % 10].encode()}) for n in part
            ]
            write_shard(place / name / f"{i:05}.tar", samples)
    return place


@pytest.fixture(scope="module")
def shards_run(home, real) -> Path:
    """A run on pictures that someone has put into shards."""
    data = ["data=shards", f"data.train={real}/train", f"data.val={real}/val"]
    home.train("shards", "trainer.max_steps=2", "trainer.val_check_interval=2", data=data)
    return home.path / "runs" / "shards"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Caches and what is no run's fall into the current folder."""
    monkeypatch.chdir(tmp_path)
    Colours.pictures.clear()
    Colours.captions.clear()


def test_the_verb_leaves_numbers_and_says_them(home, measured):
    command = ["-m", "ldm.evaluate", "ckpt=runs/measured", "count=3", "steps=2"]
    said = run(*command, cwd=home.path, OMP_NUM_THREADS="1")  # as many as this process
    facts = json.loads((home.path / "runs/measured/metrics.json").read_text())
    assert list(facts["metrics"]) == KEYS
    assert "scene accuracy alone, no distances: 3 images" in said
    assert facts["step"] == 3
    assert facts["ckpt"].endswith("step=00000003_end.ckpt")
    assert facts["digest"] == hash_file(Path(facts["ckpt"]))
    assert facts["settings"]["guidance"]["scale"] == 2
    assert {k: facts["settings"][k] for k in ("count", "seed", "steps", "size", "weights")} == {
        "count": 3, "seed": 0, "steps": 2, "size": 16, "weights": "ema",
    }  # fmt: skip
    assert facts["versions"]["torch"] == torch.__version__
    assert format_scene_table(facts["metrics"]) in said
    assert not [*(home.path / "runs/measured/eval").glob("pieces-*")]
    # Same weights, prompts, seeds and steps: what the run itself has measured at its end.
    last = home.rows("measured")[-1]
    for key in KEYS:
        assert facts["metrics"][key] == pytest.approx(float(last[f"val/{key}"]), abs=1e-6), key


def test_the_verb_takes_settings(home, measured, tmp_path, capsys):
    ckpt = str(home.path / "runs" / "measured")
    out = str(tmp_path / "new" / "m.json")
    point = composed("count=3", "raw=true", "guidance.scale=1", "seed=5")
    evaluate_points([({}, point)], asked(ckpt=ckpt, out=out))
    settings = json.loads(Path(out).read_text())["settings"]
    assert (settings["weights"], settings["guidance"]["scale"], settings["seed"]) == ("raw", 1, 5)
    said = capsys.readouterr().out
    assert "count 3, seed 5, steps 2, size 16, sampler DDIMSampler eta 0.0" in said
    assert (
        "guidance ClassifierFreeGuidance scale 1 interval [0.0, 1.0] rescale 0.0, weights raw"
        in said
    )
    assert said.endswith(f"{out}\n")
    with pytest.raises(ValueError, match="count=2"):
        evaluate_points([({}, composed("count=1"))], asked(ckpt=ckpt))


def test_a_run_is_compared_with_its_own_pictures(shards_run, real):
    facts = measure(ckpt=shards_run)
    protocol, metrics = facts["protocol"], facts["metrics"]
    assert (protocol["painted"], protocol["real"], protocol["floor"]) == (8, 20, 8)
    assert protocol["compared"] != protocol["data"]
    names = {"fd_colours", "fd_colours_floor", "kid", "precision", "clip_score_colours"}
    assert names < set(metrics)
    assert "scene_accuracy" not in metrics
    assert facts["intervals"]["fd_colours"][0] <= metrics["fd_colours"]
    assert facts["floor"]["fd_colours"] == metrics["fd_colours_floor"]
    subset = shards_run / "eval" / f"subset-{protocol['subset']}.json"
    assert set(json.loads(subset.read_text())["captions"]) <= set(Colours.captions)
    # The same captions and seeds from the frozen file, and other shards with the same pictures.
    again = measure(
        "seed=7", ckpt=shards_run, subset=subset, data=real / "copy", others=real / "train"
    )
    assert again["protocol"] == protocol
    assert again["metrics"] == metrics
    assert measure("seed=7", ckpt=shards_run)["metrics"] != metrics


def test_more_pictures_than_captions_are_told(shards_run, real, capsys):
    facts = measure("count=25", ckpt=shards_run)
    assert facts["protocol"]["painted"] == 25
    told = "count=25: there are 20 captions, so that some are used again with other seeds\n"
    assert told in capsys.readouterr().out
    measure("count=12", ckpt=shards_run, data=real / "val")  # a half of it
    assert "count=12: there are 10 captions" in capsys.readouterr().out
    measure("count=10", ckpt=shards_run, data=real / "val")
    assert "captions, so that" not in capsys.readouterr().out


def test_numbers_of_other_settings_are_kept(shards_run, capsys):
    def again(*overrides: str) -> dict:
        evaluate_points(
            [({}, composed("count=8", *COLOURS, *overrides))], asked(ckpt=shards_run, out="x")
        )
        return json.loads(Path("x/metrics.json").read_text())

    first = again()
    assert again() == first
    assert [path.name for path in Path("x").iterdir()] == ["metrics.json"], "the same once more"
    capsys.readouterr()
    second = again("steps=1")
    [former] = Path("x").glob("metrics-*.json")
    said = capsys.readouterr().out
    assert f"metrics.json (settings.steps was 2, is 1) is kept as {former.name}" in said
    assert json.loads(former.read_text()) == first
    assert second["settings"]["steps"] == 1
    assert again() == first
    assert len([*Path("x").glob("metrics-*.json")]) == 2
    for foreign in ("{torn", "[1]", '{"accuracy": 1}'):
        Path("x/metrics.json").write_text(foreign)
        with pytest.raises(UsageError, match=r"none of ldm.evaluate's .* or overwrite=true"):
            again()
        assert Path("x/metrics.json").read_text() == foreign
    assert again("overwrite=true") == first


def test_a_file_is_not_replaced_unless_that_is_asked_for(shards_run, capsys):
    """Neither a file of any name, nor pictures and curves in folders that hold others."""
    Path("x.json").write_text("mine")
    Path("kept").mkdir()
    Path("kept/0000000.png").write_text("mine")
    point = ({}, composed("count=8", *COLOURS))
    with pytest.raises(UsageError, match=r"keep=kept is no empty folder: .* overwrite=true"):
        evaluate_points([point], asked(ckpt=shards_run, out="x.json", keep="kept"))
    evaluate_points([point], asked(ckpt=shards_run, out="x.json", keep="new"))
    assert (Path("x.json").read_text(), Path("kept/0000000.png").read_text()) == ("mine", "mine")
    assert json.loads(Path("x-2.json").read_text())["metrics"]
    assert capsys.readouterr().out.endswith("x-2.json\n")
    Path("curve_steps.png").write_text("mine")
    points = [({"steps": steps}, composed(*COLOURS, f"steps={steps}")) for steps in ("1", "2")]
    with pytest.raises(UsageError, match=r"none of ldm.evaluate's \(curve_steps.png is"):
        evaluate_points(points, asked(ckpt=shards_run, out="."))


def test_scenes_are_both_read_and_compared(home, measured):
    facts = measure(ckpt=home.path / "runs" / "measured")
    assert {*KEYS, "fd_colours"} < set(facts["metrics"])
    alone = measure("scenes=false", ckpt=home.path / "runs" / "measured")
    assert alone["metrics"] == {k: v for k, v in facts["metrics"].items() if k not in KEYS}


def test_real_pictures_have_the_size_of_the_painted_ones(shards_run):
    facts = measure("size=32", ckpt=shards_run)
    assert facts["protocol"]["size"] == 32
    assert set(Colours.pictures) == {(3, 32, 32)}


def test_a_checkpoint_from_elsewhere_needs_pictures(shards_run, real, tmp_path):
    last = (shards_run / "checkpoints" / "last.ckpt").resolve()
    for path in (last, manifest_path(last)):
        shutil.copy(path, tmp_path / path.name.replace(last.stem, "mine"))
    ckpt = tmp_path / "mine.ckpt"
    assert measure(ckpt=ckpt)["metrics"] == measure(ckpt=shards_run)["metrics"]
    facts = measure(ckpt=ckpt, data=real / "val")
    assert facts["protocol"]["compared"] == facts["protocol"]["data"]  # a half of what was given
    evaluate_points([({}, composed("count=8", *COLOURS))], asked(ckpt=ckpt, data=real / "val"))
    assert (tmp_path / "evaluated" / "mine" / "metrics.json").is_file()
    payload = read_checkpoint(ckpt)
    settings = payload["ldm"]["config"]
    payload["ldm"]["config"] = re.sub(r"(train|val): /.*", r"\1: gone", settings)
    write_checkpoint(payload, ckpt)
    with pytest.raises(UsageError, match=r"not here \(.*gone.*\): give data=DIR"):
        measure(ckpt=ckpt)
    assert measure(ckpt=ckpt, data=real / "val")["metrics"] == facts["metrics"]


def test_a_checkpoint_builds_nothing_but_data(shards_run, real, tmp_path):
    """Even inside ldm.data there are functions that write files."""
    last = (shards_run / "checkpoints" / "last.ckpt").resolve()
    payload = read_checkpoint(last)
    settings = payload["ldm"]["config"]
    path = "{{_target_: pathlib.Path, _args_: [{}]}}"
    evil = f"{{{{_target_: ldm.data.shards.reader.write_shard, path: {path}, samples: []}}}}"
    kind = "ldm.data.datamodule.TextImageData"
    for name, data in {
        "call": evil.replace("samples", "size: 16, batch_size: 4, samples"),
        "part": f"{{{{_target_: {kind}, size: 16, batch_size: 4, val: x, train: {evil}}}}}",
    }.items():
        victim = tmp_path / f"{name}.txt"
        changed = re.sub(r"(?m)^data:\n(  .*\n)*", f"data: {data.format(victim)}\n", settings)
        assert str(victim) in changed
        payload["ldm"]["config"] = changed
        write_checkpoint(payload, tmp_path / f"{name}.ckpt")
        with pytest.raises(
            ValueError, match=r"asks to call ldm.data.shards.reader|does not say what it"
        ):
            measure(ckpt=tmp_path / f"{name}.ckpt")
        assert not victim.exists()


def test_what_was_kept_is_worth_the_same(shards_run, real, tmp_path):
    """Painted pictures as files, by name, with captions beside them or in the frozen subset."""
    painted = measure(ckpt=shards_run, keep="kept", data=real / "val")
    files = sorted(Path("kept").glob("*.png"))
    assert [path.stem for path in files] == [f"{i:07d}" for i in range(8)]
    same = measure(images="kept", data=real / "val")
    for name, value in painted["metrics"].items():
        if not name.endswith("_real"):  # of the captions' own pictures, where they are known
            assert same["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert same["protocol"]["painted"] == 8
    for path in Path("kept").glob("*.txt"):
        path.unlink()
    bare = measure(images="kept", data=real / "val")
    assert "clip_score_colours" not in bare["metrics"]
    assert bare["metrics"]["fd_colours"] == same["metrics"]["fd_colours"]
    subset = shards_run / "eval" / f"subset-{painted['protocol']['subset']}.json"
    frozen = measure(images="kept", data=real / "val", subset=subset)
    assert frozen["metrics"] == pytest.approx(painted["metrics"], rel=1e-5)
    assert frozen["protocol"] == painted["protocol"]
    files[-1].unlink()
    with pytest.raises(UsageError, match=r"'kept' has 7 images, and .* 8 captions"):
        measure(images="kept", data=real / "val", subset=subset)


def test_a_damaged_picture_is_named(shards_run, real):
    measure(ckpt=shards_run, keep="kept", data=real / "val")
    path = Path("kept/0000005.png")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"kept/0000005.png': damaged PNG"):
        measure(images="kept", data=real / "val")
    Image.new("RGB", (48, 48)).save(path)  # files of two sizes: that of the real images counts
    assert measure(images="kept", data=real / "val")["settings"]["size"] == 16


def test_a_peer_is_measured_by_the_same_ruler(shards_run, real, tmp_path):
    own = measure(ckpt=shards_run, data=real / "val")
    folder = peers.stable_diffusion(tmp_path / "sd")
    facts = measure("backend=diffusers", "guidance.scale=3", ckpt=folder, data=real / "val")
    assert facts["protocol"] == own["protocol"]
    assert set(facts["metrics"]) == set(own["metrics"])
    assert facts["pipeline"] == "StableDiffusionPipeline"
    assert (facts["settings"]["steps"], facts["settings"]["guidance"]) == (2, {"scale": 3})
    unguided = measure("backend=diffusers", "guidance=none", ckpt=folder, data=real / "val")
    assert unguided["metrics"] != facts["metrics"]
    with pytest.raises(UsageError, match="data is needed: give data=DIR"):
        measure("backend=diffusers", ckpt=folder)
    scenes = measure("backend=diffusers", "scenes=true", "count=8", ckpt=folder, data=real / "val")
    assert scenes["metrics"]["scene_accuracy"] == 0


def test_a_published_folder_gets_the_numbers_that_diffusers_gets(shards_run, real, tmp_path):
    folder = peers.stable_diffusion(tmp_path / "sd")
    how = ("guidance.scale=3", "steps=5")
    theirs = measure("backend=diffusers", *how, ckpt=folder, data=real / "val")
    ours = measure(*how, ckpt=folder, data=real / "val")
    assert ours["protocol"] == theirs["protocol"]
    assert ours["digest"] == theirs["digest"]
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3)
    assert ours["settings"]["sampler"]["spacing"] == "leading"
    other = measure("scenes=true", "count=4", *how, ckpt=folder, data=real / "val")
    assert other["metrics"]["scene_accuracy"] == 0
    with pytest.raises(UsageError, match="data is needed: give data=DIR"):
        measure(ckpt=folder)
    with pytest.raises(UsageError, match=r"backend=diffusers: .* is no folder of a diffusers"):
        measure("backend=diffusers", ckpt=shards_run)
    foreign = peers.pixart(tmp_path / "pixart")
    options = {"ckpt": str(foreign), "images": None, "keep": None}
    assert choose_source_kind(options) == "peer", "what we do not open, diffusers does"


def test_a_curve_looks_at_real_pictures_and_captions_once(shards_run):
    said = []  # captions that the text encoder was given

    def told(module, inputs, output):
        if isinstance(module, ClipTextEncoder):
            said.extend(inputs[0])

    hook = register_module_forward_hook(told)
    points = [
        ({"guidance.scale": scale, "sampler": sampler},
         composed("count=8", *COLOURS, f"guidance.scale={scale}", f"sampler={sampler}"))
        for scale in ("1", "3") for sampler in ("ddim", "ddpm")
    ]  # fmt: skip
    try:
        evaluate_points(points, asked(ckpt=shards_run, out="curve"))
    finally:
        hook.remove()
    assert len(Colours.pictures) == 20 + 8 + 4 * 8  # others, real, and four points
    [(name, found)] = read_curves(Path("curve")).items()
    assert name == "curve_guidance_sampler"
    assert [point["varied"] for point in found] == [varied for varied, _ in points]
    assert len({point["metrics"]["fd_colours"] for point in found}) == 4
    digests = {point["protocol"]["subset"] for point in found}
    subset = json.loads((shards_run / "eval" / f"subset-{digests.pop()}.json").read_text())
    assert not digests
    assert {*said} == {"", *subset["captions"]}
    assert len(said) <= 1 + len(subset["captions"])
    assert set(subset["captions"]) <= set(Colours.captions)
    assert len(Colours.captions) == len(set(Colours.captions))
    assert not [*(shards_run / "eval").glob("pieces-*")]


def test_points_of_a_curve_are_kept_apart(shards_run):
    points = [
        ({"steps": steps}, composed("count=8", *COLOURS, f"steps={steps}")) for steps in ("1", "2")
    ]
    evaluate_points(points, asked(ckpt=shards_run, out="curve", keep="kept"))
    for steps in (1, 2):
        assert len([*Path("kept", f"steps={steps}").glob("*.png")]) == 8


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({}, [], r"give ckpt=\.\.\. .* or images="),
        ({"images": "x"}, [], "there is no folder .x."),
        ({"ckpt": "x"}, [], "neither a run directory nor a file"),
        ({"ckpt": "RUN"}, ["features=none"], "features=none leaves scene accuracy alone"),
        ({"ckpt": "RUN"}, ["count=4"], "4 images to measure: it takes count=8 or more"),
        ({"ckpt": "RUN"}, ["count=1"], "1 image to measure: it takes count=8 or more"),
        ({"ckpt": "RUN"}, ["count=1", "scenes=true"], "another caption: give count=2 or more"),
        ({"ckpt": "RUN", "data": "gone"}, [], "gone"),
        ({"ckpt": "RUN", "data": "coco"}, [], "data=coco: .* a folder with shards .*data/coco/val"),
        ({"ckpt": "RUN", "subset": "gone.json"}, [], "gone.json"),
        ({"ckpt": "RUN", "subset": "OTHER"}, [], "of other images than data"),
        (
            {"ckpt": "RUN"},
            ["features=[inception]", "features.inception.path=gone"],
            "no Inc.* 'gone'",
        ),
        ({"images": "x", "keep": "y"}, [], "keep=... saves generated images"),
    ],
)
def test_what_cannot_be_measured_is_told(shards_run, real, given, overrides, message):
    PromptSubset.draw(ShardReader(real / "train"), 8).save(Path("other.json"))  # of other pictures
    places = {"RUN": str(shards_run), "OTHER": "other.json"}
    given = {name: places.get(value, value) for name, value in given.items()}
    point = composed("count=8", *COLOURS, *overrides)
    if any("features=" in override for override in overrides):
        point = composed("count=8", *overrides)
    with pytest.raises(UsageError, match=message), convert_to_usage_errors():
        evaluate_points([({}, point)], asked(**given))


def test_mistakes_cost_seconds_and_one_line(home, measured):
    """Through the command line: exit code 2, no trace, the remedy."""
    cases = {
        "count=1,2": "count=1,2: it takes one value here, and several are for guidance, sampler",
        "features=clip,dinov2": "a list stands in brackets: 'features=[a,b]'",
        "steps=5,many": "steps=many must be a whole number",
    }
    for words, message in cases.items():
        check_mistake(home, words, message)


@pytest.mark.slow
def test_mistakes_that_take_torch_cost_seconds_too(home, measured):
    cases = {
        "features=[inception] features.inception.path=gone": "no InceptionV3 weights at 'gone':",
        "guidance.scale=1,2 out=x.json": "out=x.json is a file",
    }
    for words, message in cases.items():
        check_mistake(home, words, message)


def check_mistake(home: Home, words: str, message: str) -> None:
    before = time.monotonic()
    command = ["-m", "ldm.evaluate", "ckpt=runs/measured", *words.split()]
    said = run(*command, cwd=home.path, expect=2)
    assert message in said
    assert "Traceback" not in said
    assert time.monotonic() - before < 60  # two cores that others use


def test_several_values_are_points(monkeypatch):
    words = [
        "evaluate",
        "-m",
        "steps=5,10,5",
        "guidance.scale=range(1,3)",
        "features=[clip]",
        "raw=true",
    ]
    monkeypatch.setattr("sys.argv", [*words, "--help", "broken=[", "y=interval(1,2)"])
    assert pop_sweep_choices() == {"steps": ["5", "10"], "guidance.scale": ["1", "2"]}
    left = ["evaluate", "features=[clip]", "raw=true", "--help", "broken=[", "y=interval(1,2)"]
    assert sys.argv == left
    assert set(VARIABLE_GROUPS) == {"run", "peer", "images"}


def pieces(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "eval").glob("pieces-*/features/*.safetensors"))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(home, shards_run):
    """What was painted before kill -9 is not painted again, and the numbers are the same."""
    command = ["-m", "ldm.evaluate", f"ckpt={shards_run}", "count=24", "batch=8", "steps=60"]
    process = start(*command, "keep=kept", "out=a", cwd=home.path)
    wait_for(lambda: pieces(shards_run) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = pieces(shards_run)
    assert 1 <= len(left) < 3, "it was to be killed in the middle"
    assert not (home.path / "a" / "metrics.json").exists()
    painted = sorted((home.path / "kept").glob("*.png"))[: 8 * len(left)]
    stamps = [path.stat().st_mtime_ns for path in painted]
    run(*command, "keep=kept", "out=a", cwd=home.path)
    assert [path.stat().st_mtime_ns for path in painted] == stamps
    assert len([*(home.path / "kept").glob("*.png")]) == 24
    assert not [*(shards_run / "eval").glob("pieces-*")]
    run(*command, "out=b", cwd=home.path)
    a, b = (json.loads((home.path / x / "metrics.json").read_text()) for x in "ab")
    assert a == b


@pytest.mark.slow
def test_an_evaluation_that_is_told_to_leave_says_how_to_go_on(home, shards_run):
    command = [f"ckpt={shards_run}", "count=24", "batch=8", "steps=60", "out=told"]
    process = start("-m", "ldm.evaluate", *command, cwd=home.path)
    wait_for(lambda: pieces(shards_run) or process.poll() is not None)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.endswith("\npython -m ldm.evaluate: stopped; the same command goes on from here\n")
    assert "Traceback" not in said
    for left in (shards_run / "eval").glob("pieces-*"):
        shutil.rmtree(left)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, measured):
    """Nine pictures and eighteen scenes in batches of four; torchrun gives each process a core."""
    command = ["-m", "ldm.evaluate", "ckpt=runs/measured", "count=9", "batch=4", "steps=2"]
    run(*command, "out=one", cwd=home.path, OMP_NUM_THREADS="1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = run(*torchrun, *command, "out=two", cwd=home.path)
    one, two = (json.loads((home.path / x / "metrics.json").read_text()) for x in ("one", "two"))
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert two["protocol"] == one["protocol"]
    assert said.count("whole caption") == said.count("two/metrics.json") == 1
    assert not [*(home.path / "runs/measured/eval").glob("pieces-*")]


def test_processes_without_torchrun_are_told_of_it(shards_run, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 8"):
        measure(ckpt=shards_run)


def test_the_table_is_aligned():
    table = format_scene_table({key: i / 20 for i, key in enumerate(KEYS)}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split("  ")[0] for line in table[1:]] == [
        "whole caption", "color", "shape", "size", "relation", "background", "style",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", table[1]) == ["whole caption", "0.000", "0.350", "0.700"]


@pytest.mark.slow
def test_two_processes_count_what_one_does(home):
    """Five prompts a split do not divide by two; the weights before the first step are the same."""
    few = [
        "trainer.max_steps=1",
        "eval.scenes.count=5",
        "eval.scenes.steps=2",
        "metric=val/scene_accuracy",
    ]
    root = Path(CONF_DIR).parent
    for name, more in {
        "one": [],
        "two": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    }.items():
        shutil.rmtree(home.path / "runs" / name, ignore_errors=True)
        options = home.options(f"name={name}", *few, *more)
        run(str(root / "train.py"), *options, cwd=home.path)
        result = json.loads((home.path / "runs" / name / "result.json").read_text())
        assert result["metric"] == "val/scene_accuracy"
        assert 0 <= result["value"] <= 1
    one, two = home.rows("one")[0], home.rows("two")[0]
    assert [one[f"val/{key}"] for key in KEYS] == [two[f"val/{key}"] for key in KEYS]
    assert any(float(one[f"val/{key}"]) for key in KEYS), "nothing was right, so nothing was told"
