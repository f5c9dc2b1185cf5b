"""What files may build: exactly the components of conf/, whose construction writes nothing."""

import math
import os
import re
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from pipeline_text import write_sdxl_text
from tiny_t5 import save_tiny_t5
from world import small_autoencoder, write_shapes

from ldm.cli.explain import is_text_to_image_run
from ldm.cli.package import package_autoencoder
from ldm.config import command_line
from ldm.config.components import build_objective, load_diffusion_checkpoint
from ldm.config.evaluation import build_evaluation_source
from ldm.config.guidance import load_guide_denoiser, load_noisy_classifier
from ldm.config.own_components import COMPONENT_GROUPS, DIFFUSION_GROUPS
from ldm.config.pipeline import LoadedPipeline, load_cascade, load_pipeline
from ldm.config.registry import list_component_targets, validate_component
from ldm.config.run import warm_start_from_init
from ldm.config.train_run import check_config_unchanged
from ldm.config.training_images import SCENES_TARGET, open_run_images
from ldm.diffusion.schedules import cosine
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.experiments.former_names import FORMER_TARGETS
from ldm.inference.components import Components
from ldm.models.text.labels import NullTextEncoder
from ldm.utils.checkpoint_file import CheckpointError, write_checkpoint
from ldm.utils.errors import UsageError

CPU = torch.device("cpu")
CLIP_SAVE = {
    "_target_": "ldm.models.clip.Clip.save",
    "self": {"_target_": "ldm.models.clip.Clip.load", "path": "packaged:clip"},
    "folder": "precious",
}
MKDIR = {"_target_": "os.mkdir", "path": "made"}
UNIFORM = "ldm.diffusion.weightings.UniformWeighting"
MIN_SNR = {"_target_": "ldm.diffusion.weightings.MinSNRWeighting", "gamma": 5.0}
ROOT = "precious/thesis.txt"

# What is changed in the configuration of an honest run: key, value, words of the refusal.
HOSTILE = {
    "a method": ("weighting", CLIP_SAVE, "asks to call 'ldm.models.clip.Clip.save'"),
    "a function that writes": (
        "loss",
        {"_target_": "ldm.utils.checkpoint_file.export_weights", "payload": {}, "path": "made"},
        "asks to call 'ldm.utils.checkpoint_file.export_weights'",
    ),
    "a component of another group": (
        "scheduler",
        {"_target_": "ldm.models.text.clip.ClipTextEncoder", "path": "packaged:clip"},
        "which is no scheduler of ours",
    ),
    "the class behind a function": (
        "autoencoder",
        {"_target_": "ldm.models.diffusers_format.save_autoencoder", "folder": "made"},
        "which is no autoencoder of ours",
    ),
    "a re-export": (
        "task._target_",
        "ldm.diffusion.tasks.base.torch.hub.load",
        "which is no task of ours",
    ),
    "a library": ("model._target_", "torch.load", "which is no model of ours"),
    "a partial": ("weighting", {**MIN_SNR, "_partial_": True}, "the key '_partial_'"),
    "positional arguments": ("weighting", {**MIN_SNR, "_args_": [1]}, "the key '_args_'"),
    "not recursive": ("objective._recursive_", False, "the key '_recursive_'"),
    "a conversion": ("model._convert_", "object", "the key '_convert_'"),
    "an unknown key": ("scheduler.callback", "os.system", "the key 'callback'"),
    "a size to build for hours": ("model.blocks", 10**6, "model.blocks=1000000 must be"),
    "a call in a key": ("scheduler.steps", MKDIR, "scheduler.steps is a component"),
    "a call in a list": ("model.multipliers", [1, MKDIR], "no plain value"),
    "a call in a nested list": ("model.attention", [[[MKDIR]]], "no plain value"),
    "a call in place of a nested part": ("objective.prediction", MKDIR, "asks to call 'os.mkdir'"),
    "a call in place of a handed part": ("objective.schedule", MKDIR, "is a component, where none"),
    "a target that is a list": ("loss", {"_target_": ["os.mkdir"]}, "which is no name of ours"),
    "a target that is a mapping": ("loss", {"_target_": MKDIR}, "which is no name of ours"),
    "a target without a module": ("loss._target_", "print", "which is no loss of ours"),
    "a private way to a target": (
        "loss._target_",
        f"ldm.config.components.{UNIFORM}",
        "no loss of ours",
    ),
    "the environment": ("autoencoder.path", "${oc.env:HOME}", "to be looked up elsewhere"),
    "a resolver of ours": ("text_encoder.path", "${run_stamp:}", "to be looked up elsewhere"),
    "an interpolated target": ("loss._target_", "${name}", "which is no loss of ours"),
    "a missing value": ("scheduler.steps", "???", "to be looked up elsewhere"),
    "a size beyond all": ("scheduler.steps", 10**30, "beyond all sizes"),
    "a date": ("scheduler.steps", "2024-01-01", "must be a whole number"),
    "a group that is text": ("loss", "os.mkdir", "loss is 'os.mkdir', and no component"),
    "a group that is a list": ("loss", [MKDIR], "and no component"),
    "no target": ("loss", {"path": "made"}, "asks to call None"),
}


@pytest.fixture
def honest() -> dict:
    """The configuration of a run, as its checkpoint has it."""
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=["name=x"])
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with something to lose."""
    monkeypatch.chdir(tmp_path)
    Path("precious").mkdir()
    Path(ROOT).write_text("mine")
    return tmp_path


def changed(config: dict, key: str, value: object) -> dict:
    """The configuration with another value."""
    *groups, leaf = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[leaf] = value
    return config


def written(config: object, place: Path, *, stage: str = "diffusion") -> Path:
    """A checkpoint that says it was trained with this configuration."""
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    path = place / "run" / "checkpoints" / "step=00000001.ckpt"
    frozen = {"autoencoder": "0", "text_encoder": "0"}
    payload = {"state_dict": {"w": torch.zeros(1)}, "global_step": 1}
    write_checkpoint({**payload, "ldm": {"stage": stage, "config": text, "frozen": frozen}}, path)
    return path


def everything(place: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    found = place.rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES += ("shutil.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
WRITES += ("socket.connect", "os.chmod", "os.utime")
_listeners: list[list] = []


def _hear(event: str, args: tuple) -> None:
    if not _listeners:
        return
    opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    compiled = event in ("open", "os.rename") and "__pycache__" in str(args[0])
    if (opened or event.startswith(WRITES)) and not compiled:
        _listeners[-1].append((event, str(args)))


sys.addaudithook(_hear)  # there is no way to take it away: it listens inside `audited` alone


@contextmanager
def audited():
    """What is written, deleted, started or called over a network within the block."""
    heard: list[tuple[str, str]] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.remove(heard)


def test_an_audit_hears_of_files(tmp_path):
    with audited() as heard:
        (tmp_path / "x").write_text("x")
        (tmp_path / "x").unlink()
        (tmp_path / "y").mkdir()
    assert [event for event, _ in heard] == ["open", "os.remove", "os.mkdir"]


def test_an_honest_configuration_is_admitted_as_it_is(honest, place):
    read = load_diffusion_checkpoint(str(written(honest, place))).config
    for group in DIFFUSION_GROUPS:
        assert OmegaConf.to_container(read[group]) == honest[group]
    assert read.data == honest["data"]
    assert "optimizer" not in read, "what no model is built of is left out"


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_builds_nothing(case, honest, place):
    key, value, words = HOSTILE[case]
    path = written(changed(honest, key, value), place)
    before = everything(place)
    with audited() as heard, pytest.raises(CheckpointError) as refused:
        load_diffusion_checkpoint(str(path))
    assert heard == []
    assert everything(place) == before
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(path))


@pytest.mark.parametrize("trust", [(), ("another",), ("ldm", "another")])
@pytest.mark.parametrize("case", HOSTILE)
def test_trust_in_another_package_opens_nothing(case, trust, honest, place):
    key, value, words = HOSTILE[case]
    path = written(changed(honest, key, value), place)
    with audited() as heard, pytest.raises(CheckpointError, match=re.escape(words)):
        load_diffusion_checkpoint(str(path), trust=trust)
    assert heard == []
    assert not Path("made").exists()


OWN = {"_target_": "own_noise.schedules.PowerSchedule", "shift": -3.0}


def test_a_component_of_a_trusted_package_is_admitted():
    """Its numbers are its own affair: ours would refuse this shift."""
    assert validate_component(OWN, "scheduler", trust=["own_noise"]) == OWN
    flow = {"_target_": "own_noise.schedules.make_flow", "shift": 2.0}
    assert validate_component(flow, "scheduler", trust=("other", "own_noise")) == flow


@pytest.mark.parametrize("trust", [None, (), ("own", "own_noise.schedules", "another")])
def test_a_package_that_is_not_trusted_is_not_imported(trust):
    sys.modules.pop("own_noise.schedules", None)
    with pytest.raises(ValueError, match=r"which is no scheduler of ours") as refused:
        validate_component(OWN, "scheduler", trust=trust)
    hint = "add trust=[own_noise] if you trust that package"
    assert (hint in str(refused.value)) == (trust is not None), "not for commands without trust="
    assert "own_noise.schedules" not in sys.modules


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("own_noise.schedules.mkdir", "no class or function that own_noise defines"),
        ("own_noise.schedules.torch.load", "no class or function that own_noise defines"),
        ("own_noise.schedules.FlowSchedule", "no class or function that own_noise defines"),
        ("own_noise.schedules.PowerSchedule.forward", "no class or function that own_noise"),
        ("own_noise.schedules", "no class or function that own_noise defines"),
        ("own_noise.schedules.Nothing", "no class or function that own_noise defines"),
        ("own_noise.schedules.lazy.made", "no class or function that own_noise defines"),
        ("own_noise.nowhere.make", "no class or function that own_noise defines"),
        ("own_noise..make", "no class or function that own_noise defines"),
        ("own_noise.broken.make", "own_noise was trusted, and fails: ModuleNotFoundError"),
        ("own_noise", "no scheduler of ours"),
    ],
)
def test_only_what_a_trusted_package_defines_may_be_built(target, words, place):
    with pytest.raises(ValueError, match=words):
        validate_component({"_target_": target}, "scheduler", trust=["own_noise"])
    assert not Path("made").exists()


def test_a_trusted_package_that_is_not_installed_is_named(place):
    words = "there is no module 'own_nothing': install own_nothing, or give PYTHONPATH=FOLDER"
    with pytest.raises(ValueError, match=words):
        validate_component({"_target_": "own_nothing.a.B"}, "scheduler", trust=["own_nothing"])


OTHERS = ("os.makedirs", "shutil.rmtree", "subprocess.Popen", "importlib.import_module")
OTHERS += ("torch.hub.load", "lightning.Trainer", "hydra.utils.instantiate", "builtins.list")
OTHERS += ("__main__.main", "hydra_plugins.ldm_launchers.local.list")


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("trusted", [True, False])
def test_a_library_is_no_package_of_the_users_own(target, trusted):
    package = target.partition(".")[0]
    with pytest.raises(ValueError, match=f"and {package} is no package of your own$"):
        validate_component({"_target_": target}, "loss", trust=[package] if trusted else [])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"power": 2}, "the key 'power', which"),
        ({"_partial_": True}, "the key '_partial_', which"),
        ({"shift": MKDIR}, "'os.mkdir', which is no scheduler.shift of ours"),
        ({"shift": [{"a": MKDIR}]}, "'os.mkdir', which is no scheduler.shift of ours"),
        ({"shift": {"_call_": 1}}, "scheduler.shift has the key '_call_'"),
        ({"shift": "${oc.env:HOME}"}, "to be looked up elsewhere"),
        ({"shift": math.inf}, "must be a finite number"),
    ],
)
def test_arguments_of_a_trusted_component_are_checked(argument, words):
    with pytest.raises(ValueError, match=words):
        validate_component(OWN | argument, "scheduler", trust=["own_noise"])


def test_a_trusted_function_may_take_any_argument_of_its_own():
    flow = {"_target_": "own_noise.schedules.make_flow", "power": 2.0}
    assert validate_component(flow, "scheduler", trust=["own_noise"]) == flow
    with pytest.raises(ValueError, match="the key '_partial_'"):
        validate_component(flow | {"_partial_": True}, "scheduler", trust=["own_noise"])


def test_a_trusted_component_may_have_mappings_and_components_of_its_package():
    inner = {"_target_": "own_noise.schedules.PowerSchedule", "shift": 2.0}
    for shift in ({"low": 1, "high": [2, 3]}, inner, [{"part": inner}]):
        whole = OWN | {"shift": shift}
        assert validate_component(whole, "scheduler", trust=["own_noise"]) == whole


def test_weights_of_caption_keys_are_plain_values():
    data = {"_target_": "ldm.data.datamodule.TextImageData", "captions": {"long": 0.8, "short": 1}}
    assert validate_component(data, "data") == data
    for wrong in ({"long": "x"}, {"long": {"_target_": "os.mkdir"}}, {"_target_": "os.mkdir"}, {}):
        with pytest.raises(ValueError, match=r"data\.captions is a component"):
            validate_component(data | {"captions": wrong}, "data")


TEXTS = {
    "code": ("!!python/object/apply:os.mkdir [made]", "no YAML of plain values"),
    "aliases": ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "YAML alias"),
    "depth": ("[" * 900, "nested more than 20 deep"),
    "no mapping": ("- 1", "no mapping, but of type list"),
    "nothing": ("", "no mapping, but of type NoneType"),
    "a bad text": ("a: [", "no YAML of plain values"),
    "numbers for keys": ("1: 2", "key 1 is no text"),
    "too long": ("a: " + "x" * 2**20, "none has more than"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_configuration_is_refused(case, place):
    text, words = TEXTS[case]
    path = written(text, place)
    with pytest.raises(CheckpointError, match=words) as refused:
        load_diffusion_checkpoint(str(path))
    assert "\n" not in str(refused.value)
    assert not Path("made").exists()


def beside() -> Components:
    objective = build_objective(OmegaConf.create(OBJECTIVE))
    return Components(None, small_autoencoder(), NullTextEncoder(), None, objective, TextToImage())


OBJECTIVE = {
    "scheduler": {"_target_": "ldm.diffusion.schedules.cosine"},
    "weighting": {"_target_": UNIFORM},
    "timestep_sampler": {"_target_": "ldm.diffusion.timesteps.PowerTimestepSampler"},
    "objective": {
        "_target_": "ldm.diffusion.objective.Objective",
        "prediction": {"_target_": "ldm.diffusion.predictions.Prediction", "kind": "v"},
    },
    "data": {"batch_size": 4},
}


def evaluated(ckpt: str) -> object:
    cfg = OmegaConf.create({"features": {}, "device": "cpu"})
    asked = {"ckpt": ckpt, "autoencoder": None, "text_encoder": None}
    return build_evaluation_source(cfg, asked, kind="run")


DOORS = {
    "sample, explain, augment": lambda run: load_pipeline(
        OmegaConf.create({"device": "cpu"}), run, {}
    ),
    "cascade": lambda run: load_cascade(
        OmegaConf.create({"device": "cpu", "cascade_guidance_scale": 1.0, "guidance": {}}),
        [run, run],
        {},
    ),
    "evaluate, phema": evaluated,
    "guide": lambda run: load_guide_denoiser(run, beside(), device=CPU),
    "init": lambda run: warm_start_from_init(OmegaConf.create({"init": run}), beside()),
    "classifier": lambda run: load_noisy_classifier(run, beside(), device=CPU),
    "package": lambda run: package_autoencoder(Path(run), Path("made"), scenes=1),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses(door, honest, place):
    honest |= {name: deepcopy(CLIP_SAVE) for name in ("scheduler", "autoencoder")}
    stage = "classifier" if door == "classifier" else "diffusion"
    run = written(honest, place, stage=stage).parent.parent
    (run / "config.yaml").write_text(yaml.safe_dump(honest))
    before = everything(place)
    with audited() as heard, pytest.raises(CheckpointError, match="asks to call") as refused:
        DOORS[door](str(run))
    assert "\n" not in str(refused.value)
    assert heard == []
    assert everything(place) == before


def test_a_run_directory_is_looked_at_without_looking_anything_up(honest, place, monkeypatch):
    monkeypatch.setenv("SECRET", "a secret")
    honest["autoencoder"]["path"] = "${oc.env:SECRET}"
    run = written(honest, place).parent.parent
    (run / "config.yaml").write_text(yaml.safe_dump(honest))
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=["name=x"])
        with pytest.raises(UsageError, match=r"autoencoder\.path was") as refused:
            check_config_unchanged(cfg, run)
        assert "a secret" not in str(refused.value)
        (run / "config.yaml").write_text("a: &a [x]\nb: [*a]")
        with pytest.raises(UsageError, match="YAML alias"):
            check_config_unchanged(cfg, run)
    assert is_text_to_image_run(run / "config.yaml") is False


SHARDS = {"_target_": "ldm.data.datamodule.TextImageData", "size": 16, "batch_size": 4}
DRAWN = {"_target_": SCENES_TARGET, "folder": "chosen", "count": 8, "val_count": 4, "size": 16}
CACHED = {"cache": "chosen", "cache_gb": 1e-9}
ELSEWHERE = {
    "a world to be drawn": DRAWN | {"batch_size": 4},
    "a server": SHARDS | {"train": "http://127.0.0.1:9/x.tar", "val": "shards"} | CACHED,
    "servers in a list": SHARDS | {"train": ["shards", "s3://x/y.tar"], "val": "shards"} | CACHED,
    "a pipe": SHARDS | {"train": "pipe:touch made", "val": "shards"} | CACHED,
    "a folder that is not there": SHARDS | {"train": "gone", "val": "shards"} | CACHED,
    "no folder": SHARDS | {"val": "shards"} | CACHED,
    "a number": SHARDS | {"train": 5, "val": "shards"} | CACHED,
    "another function": {"_target_": "ldm.data.shards.reader.write_shard", "path": "made"},
}


def of(data: dict, place: Path) -> LoadedPipeline:
    """What of a run says what it was trained on."""
    config = OmegaConf.create({"data": data})
    return LoadedPipeline(None, place / "x.ckpt", 1, config, {}, {})


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_checkpoint_brings_no_pictures(case, place):
    """Nothing is drawn, fetched or written for it: the user says where pictures are."""
    write_shapes(place / "shards", range(4))
    before = everything(place)
    with audited() as heard, pytest.raises(ValueError, match=r"[gG]ive data=DIR"):
        open_run_images(of(ELSEWHERE[case], place), 16)
    assert heard == []
    assert everything(place) == before


def test_pictures_that_are_here_are_read_and_nothing_is_left_beside_them(place):
    write_shapes(place / "shards", range(4))
    before = everything(place)
    data = SHARDS | {"train": "shards", "val": ["shards/*.tar"], "min_size": 8} | CACHED
    val, train = open_run_images(of(data, place), 16)
    assert (len(val), len(train)) == (4, 4)
    assert everything(place) == before
    write_shapes(Path("chosen/16px/train-8"), range(3))
    write_shapes(Path("chosen/16px/val-4"), range(2))
    val, train = open_run_images(of(ELSEWHERE["a world to be drawn"], place), 16)
    assert (len(val), len(train)) == (2, 3)


def test_former_names_lead_to_components():
    for old, new in FORMER_TARGETS.items():
        assert any(new in targets for targets in list_component_targets().values()), new
        try:
            component = get_object(old)
        except Exception:  # the name is gone, or it is imported where it was defined
            continue
        assert component is get_object(new)


def options(group: str) -> list[str]:
    return [path.stem for path in sorted(Path(command_line.CONF_DIR, group).glob("*.yaml"))]


LEAVES = [(group, option) for group in COMPONENT_GROUPS for option in options(group)]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"), ["a red circle"])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return write_sdxl_text(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def taesd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taesd")
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**widths, **blocks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("group", "option"), LEAVES, ids=lambda part: part)
def test_what_may_be_built_writes_nothing(group, option, place, t5, sdxl, taesd):
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=["name=x", f"{group}={option}"])
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if "path" in cfg[group] and not str(cfg[group].path).startswith("packaged:"):
        near = {"autoencoder": None, "text_encoder": "packaged:clip"}[group]
        folders = {"t5": t5, "sdxl": sdxl, "diffusers": taesd}
        cfg[group].path = str(folders[option]) if option in folders else near
    large = group == "model" or option == "sd"
    node = OmegaConf.to_container(cfg[group])
    admitted = validate_component(node, group) if node else None
    before = everything(place)
    with audited() as heard, torch.device("meta" if large else "cpu"):
        handed = {}
        if group == "model":
            handed = {"in_channels": 4, "out_channels": 4, "context_dim": 8}
        if group == "classifier":
            handed = {"in_channels": 4, "schedule": cosine()}
        if group in ("objective", "weighting", "loss", "timestep_sampler"):
            build_objective(cfg)
        elif admitted:
            instantiate(OmegaConf.create(admitted), **handed, _convert_="all")
    assert heard == []
    assert everything(place) == before


def test_every_component_that_a_file_may_name_is_one_of_these():
    """The list that is walked above is the list that files may choose from."""
    walked = set()
    for group, option in LEAVES:
        walked |= targets(
            yaml.safe_load(Path(command_line.CONF_DIR, group, f"{option}.yaml").read_text())
        )
    for place, allowed in list_component_targets().items():
        if place.split(".")[0] in COMPONENT_GROUPS:
            assert allowed <= walked
    assert all(get_object(target).__module__.startswith("ldm.") for target in walked)


def targets(node: object) -> set[str]:
    if not isinstance(node, dict):
        return set()
    own = {node["_target_"]} if "_target_" in node else set()
    return own.union(*map(targets, node.values()))
