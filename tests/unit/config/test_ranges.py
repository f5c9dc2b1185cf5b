"""Numbers of settings: each has a range, and what lies outside is one line before all else."""

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning.fabric.plugins.precision.precision import (
    _PRECISION_INPUT_STR,
    _PRECISION_INPUT_STR_ALIAS,
)
from omegaconf import OmegaConf
from shell import ROOT, TRAIN, run

from ldm.config import command_line
from ldm.config.config_check import check_config
from ldm.config.ranges import SETTING_RANGES, find_setting_rule, format_invalid_value
from ldm.diffusion.predictions import PREDICTIONS
from ldm.diffusion.samplers.edm import SLOPES
from ldm.diffusion.samplers.pndm import AVERAGES
from ldm.diffusion.samplers.spacing import GRIDS, LINEAR_SPACINGS, SPACINGS
from ldm.diffusion.timesteps import SPREADS
from ldm.utils.errors import UsageError

COMMANDS = sorted(path.stem for path in Path(command_line.CONF_DIR).glob("*.yaml"))
LIGHTNING_PRECISIONS = _PRECISION_INPUT_STR.__args__ + _PRECISION_INPUT_STR_ALIAS.__args__
ODD = [float("nan"), float("inf"), -1, 0, 1.5, None, 1e30, "many", True]
# What is taken though it looks odd, and what it means.
NULL_MEANS = {
    "buckets": "squares",
    "data.buckets": "squares",
    "prepare size": "as large as it is",
    "dtype": "as trained, and float32 on a CPU",
    "decode_tile": "whole",
    "backend": "ours where it can",
    "sampler.original_steps": "any time",
    "sampler.grid": "ours",
    "sampler.timestep_scaling": "x0_hat as it is",
    "trainer.gradient_clip_val": "no bound",
    "trainer.precision": "float32",
    "hydra.devices": "a fair share",
    "hydra.seed": "another one each time",
}
HUGE_MEANS = {
    "cache_gb": "nothing is ever deleted",  # 1e30
    "data.cache_gb": "all that there is",
    "early_stop.min_delta": "never good enough",
    "guidance.bound": "no bound",
    "sampler.clip": "no bound",
    "sampler.churn_min": "no step",
    "sampler.churn_max": "every step",
    "trainer.gradient_clip_val": "no bound",
    "trainer.max_hours": "no end",
}
NEGATIVE_MEANS = {  # -1
    "prepare threshold": "a cosine",
    "trainer.devices": "all",
    "text_encoder.layer": "the last",
    **dict.fromkeys(
        ("cascade_guidance_scale", "guidance.scale", "guidance.style_scale"), "away from it"
    ),
    "guidance.parallel": "turned round",
    **dict.fromkeys(("scheduler.start", "scheduler.end"), "of sigmoid_alpha's curve"),
    **dict.fromkeys(("scheduler.location", "timestep_sampler.mean"), "to the other side"),
}


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}", value


def is_number(value):
    if isinstance(value, list):
        return bool(value) and all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def known():
    """Command, key and default of every setting of every file below conf/."""
    found = []
    for path in sorted(Path(command_line.CONF_DIR).glob("**/*.yaml")):
        place = path.relative_to(command_line.CONF_DIR).parent.as_posix().replace("/", ".")
        node = OmegaConf.to_container(OmegaConf.load(path))
        command = path.stem if place == "." else "train"
        node.pop("hydra", None)
        prefix = "" if place in (".", "experiment") else f"{place}."
        found += [(command, f"{prefix}{key}", value) for key, value in leaves(node)]
    return found


def test_every_number_of_every_file_has_a_range_in_which_it_lies():
    for command, key, value in known():
        if is_number(value):
            assert find_setting_rule(key, command) is not None, (
                f"{key} is not in ldm/config/ranges.py"
            )
        if find_setting_rule(key, command) is not None and "${" not in str(value):
            assert not format_invalid_value(key, value, command, default=value)


def test_words_are_those_of_the_classes():
    for key, words in (
        ("sampler.spacing", SPACINGS),
        ("sampler.grid", GRIDS),
        ("sampler.ends", LINEAR_SPACINGS),
        ("sampler.average", AVERAGES),
        ("sampler.slope", SLOPES),
        ("timestep_sampler.spread", SPREADS),
        ("objective.kind", PREDICTIONS),
        ("trainer.precision", ("auto", *LIGHTNING_PRECISIONS)),
    ):
        assert set(find_setting_rule(key, "train")[0].words) == set(words)


def test_odd_values_are_one_line_or_have_a_meaning():
    taken = {}
    for name in SETTING_RANGES:
        command, _, key = name.rpartition(" ")
        command = command or "train"
        for value in ODD:
            said = format_invalid_value(key, value, command, default=0)
            assert "\n" not in said
            assert not said or said.startswith(f"{key}=")
            if not said:
                taken.setdefault(repr(value), set()).add(name)
        rules = find_setting_rule(key, command)
        for value in ([float("nan")], [], [1, "a"], {"a": 1}):
            may_be_empty = value == [] and name == "phema.lengths"
            assert format_invalid_value(key, value, command, default=0) or may_be_empty
        assert any(
            str(rule) in format_invalid_value(key, "many", command, default=0) for rule in rules
        )
    assert {"nan", "inf", "'many'"} & taken.keys() == set()
    assert taken["True"] == {"checkpoint.background", "plan"}  # or a word
    assert taken["None"] == NULL_MEANS.keys()
    assert taken["1e+30"] == HUGE_MEANS.keys()
    assert taken["-1"] == NEGATIVE_MEANS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_number_of_a_command_is_checked(command):
    """All of its numbers, also those that are null, once each through what the command calls."""
    given = ["source=x", "images=x", "out=x"] if command == "prepare" else []
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose(command, given)
        check_config(cfg, command, given)
        plain, found = OmegaConf.to_container(cfg), 0
        for key, value in leaves(plain):
            if find_setting_rule(key, command) is None:
                assert not is_number(value), key
                continue
            found += 1
            OmegaConf.update(cfg, key, float("nan"))
            with pytest.raises(UsageError, match=f"^{key}=nan must be"):
                check_config(cfg, command, given)
            OmegaConf.update(cfg, key, value)
    assert found


def refusal(command, *words):
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose(command, list(words))
        with pytest.raises(UsageError) as error:
            check_config(cfg, command, words)
    return str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        *("guidance.interval=[0.8,0.2]", "guidance.interval=[0,1,1]", "optimizer.betas=[0.9,1]"),
        *("optimizer.betas=0.9", "trainer.limit_val_batches=1.5", "trainer.devices=0"),
        *("validate_raw=1", "phema=3", "samples=null", "name=null", "time_power=-1"),
        "guidance.inner.scale=nan guidance=autoguidance",
        "+model.depth=0",
        "+model.new=nan",
        "+trainer.overfit_batches=inf",
        "caption_dropout=${trainer.max_steps}",
        "caption_dropout=${nowhere}",
        "data=shards data.train=a data.val=b data.window=0",
        "eval.scenes.every=0",
        "lora.rank=0 init=runs/base",
    ],
)
def test_what_cannot_be_meant_is_named(words):
    key = words.split()[0].partition("=")[0].lstrip("+")
    said = refusal("train", *words.split())
    assert said.startswith(key)
    assert "\n" not in said


def test_classes_from_elsewhere_have_no_ranges():
    own = ["scheduler=flow", "scheduler._target_=own_noise.schedules.PowerSchedule"]
    own += ["~scheduler.base"]  # as the command line does by itself
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        words = [*own, "scheduler.shift=-7"]
        check_config(compose("train", words), "train", words)
        words = [*own, "scheduler.shift=nan"]
        with pytest.raises(UsageError, match=r"^scheduler.shift=nan must be a finite number"):
            check_config(compose("train", words), "train", words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.max_steps=-5"], "trainer.max_steps=-5 must be a whole number from 1"),
        (["name=../x"], "name='../x' names no run"),
        (['name="a\nb"'], r"name='a\nb' names no run"),
        (["name=a\nb"], r"cannot read name=a\nb: what has blanks"),
        (["stage=foo"], "stage=foo must be one of diffusion, autoencoder, clip, classifier"),
        (["trainer.accelerator=foo"], "trainer.accelerator=foo must be one of auto, cpu, gpu"),
        (["metric=loss"], "metric=loss is not measured by this run - did you mean val/loss?"),
        (
            ["metric=foo"],
            "metric=foo is not measured by this run: it measures train/loss, val/scene",
        ),
        (["eval=none", "metric=val/motion_x"], "this run: eval=scenes, or eval=motion for videos,"),
        (["early_stop=patience", "early_stop.metric=val/fid"], "early_stop.metric=val/fid is not"),
        (
            ["experiment=clip_coco", "metric=val/psnr"],
            "metric=val/psnr is not measured by this run",
        ),
        (["data.size=100"], "data.size=100 must be a multiple of 16"),
        (["init=runs/gone"], "init='runs/gone' is neither a run directory nor a file"),
        (["data=shards", "data.train=gone", "data.val=gone"], "no shards at gone: `python -m ldm"),
        (["trainer.devices=5"], "data.batch_size=32 is the batch of an optimizer step: it must be"),
        (["autoencoder.path=null"], "autoencoder.path is needed: a trained autoencoder"),
        (["stage=autoencoder", "autoencoder=diffusers"], "and DiffusersAutoencoder is none: take"),
        (["text_encoder.path=runs/gone"], "text_encoder.path=runs/gone: there is no such run"),
        (["-m", "scheduler=cosine,linear", "stage=foo"], "stage=foo must be one of"),
        (["guidance=7"], "guidance=7 is no option of guidance: guidance.scale=7 sets"),
        (["-m", "optimizer.lr=1e-3,-1"], "optimizer.lr=-1 must be"),
        (["-m", "scheduler=cosine,linear", "seed=null"], "seed=null must be"),
        (["-m", "seed=1,2", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 must be"),
        (["-m", "scheduler=flow,linear", "loss.c=1"], "there is loss.c of huber"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, words, said):
    home = tmp_path / "home"
    home.mkdir()
    told = run(TRAIN, *words, cwd=home, expect=2)
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert not list(home.iterdir())
    assert list(tmp_path.iterdir()) == [home]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("ldm.evaluate ckpt=x guidance=1,2,3", "guidance.scale=1,2,3 sets"),
        ("ldm.evaluate ckpt=x guidance.scale=1,nan", "guidance.scale=nan must be"),
        ("ldm.prepare scenes out=x size=null", "size=null is for image files"),
        ("ldm.prepare foldr out=x", "there is no source 'foldr' - did you mean folder?"),
        ("ldm.prepare", "a source is needed. Give one of coco, folder"),
        ("ldm.evaluate --ckpt x", "--ckpt is no flag: settings are written without dashes, ckpt=x"),
        ("ldm.phema ckpt=x lengths=0.1,nan", "lengths=0.1,nan: each must be a number above 0"),
    ],
)
def test_other_commands_refuse_alike(tmp_path, command, said):
    assert said in run("-m", *command.split(), cwd=tmp_path, expect=2)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_there_before_is_not_deleted(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    run(TRAIN, "name=a", "trainer.max_steps=0", cwd=tmp_path, expect=2)
    assert (tmp_path / "runs" / "a").is_dir()
    said = run(str(ROOT / "sample.py"), "ckpt=x", "n=0", cwd=tmp_path, expect=2)
    assert said.strip() == "sample.py: n=0 must be a whole number from 1 to 1000000000"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample.py ckpt=gone", "ckpt='gone' is neither a run directory nor a file"),
        ("ldm/cli/phema.py ckpt=gone length=0.1", "ckpt='gone' is neither"),
        ("ldm/cli/augment.py ckpt=gone out=x", "ckpt='gone' is neither"),
        ("ldm/cli/evaluate.py ckpt=gone", "ckpt='gone' is neither"),
        ("ldm/cli/explain.py ckpt=gone", "ckpt='gone' is neither"),
        ("sample.py ckpt=. guidance=autoguidance guidance.guide=typo", "guidance.guide='typo' is"),
        ("sample.py ckpt=. device=nowhere", "device=nowhere is not here: take one of cpu"),
    ],
)
def test_what_is_not_there_is_told_before_seconds_of_imports(tmp_path, words, said):
    script, *words = words.split()
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['x', *{words}]\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('lightning' in sys.modules or 'transformers' in sys.modules)\n"
    )
    told = run("-c", code, cwd=tmp_path)
    assert said in told
    assert told.splitlines()[-1] == "False"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["5", "true", "[..]", "[a.b]", "[null]", "[a,1]", '""'])
def test_trust_names_packages(value):
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        words = [f"trust={value}"]
        with pytest.raises(UsageError, match=r"is no name of a package: give trust=\["):
            check_config(compose("sample", words), "sample", words)
        with pytest.raises(UsageError, match="shutil is no package of your own, leave it out"):
            check_config(compose("sample", ["trust=[mine,shutil]"]), "sample", [])
        for good in ("trust=[]", "trust=null", "trust=mine", "trust=[mine,others]"):
            check_config(compose("sample", [good]), "sample", [good])
