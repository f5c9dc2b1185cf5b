"""Options of folders and of installed packages: found, suggested, and checked before a run."""

import re
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from shell import ROOT, TRAIN, run
from team import CONF, OUTSIDE, install

import ldm
from ldm.config.own_components import check_own_component, list_replaced_settings
from ldm.config.search_path import CONF_DIR, list_group_options, order_command_words
from ldm.config.suggestions import format_unknown_setting
from ldm.config.trust import list_trusted_packages, read_user_trust
from ldm.utils.errors import UsageError

FOLDER = {"PYTHONPATH": f"{ROOT}:{OUTSIDE}"}
SINE = "teampackage.diffusion.SineSchedule"


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    monkeypatch.syspath_prepend(OUTSIDE)


def test_flags_of_hydra_may_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["a=1", "--config-dir", "x", "b=2", "-m", "--cfg", "job", "c=3", "-cd=/y"]
    flags = [f"--config-dir={tmp_path}/x", "-m", "--cfg", "job", "--config-dir=/y"]
    assert order_command_words(words) == [*flags, "a=1", "b=2", "c=3"]
    assert order_command_words(["hydra.searchpath=[file://x,pkg://teampackage.conf]"]) == [
        f"--config-dir={tmp_path}/x",
        f"--config-dir={CONF}",
    ]


def test_the_first_directory_with_an_option_counts(tmp_path, monkeypatch):
    for name in ("cosine", "mine"):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / f"{name}.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config-dir={tmp_path}"])
    options = list_group_options("scheduler")
    assert options["mine"] == tmp_path / "scheduler" / "mine.yaml"
    assert options["cosine"] == Path(CONF_DIR, "scheduler", "cosine.yaml")
    said = run(TRAIN, "scheduler=x", f"--config-dir={tmp_path}", cwd=tmp_path, expect=2)
    assert f"note: {tmp_path}/scheduler/cosine.yaml is not read: scheduler=cosine is" in said


@pytest.mark.parametrize(
    "way", ["--config-dir=DIR", "-cd=DIR", "hydra.searchpath=[file://DIR]", "installed"]
)
def test_a_mistake_names_the_options_of_every_directory(tmp_path, way):
    (tmp_path / "link").symlink_to(CONF)
    words, marker = [way.replace("DIR", "link")], tmp_path / "imported"
    more = {"PYTHONPATH": str(ROOT), "TEAM_MARKER": str(marker)}
    if way == "installed":
        words, more["PYTHONPATH"] = [], install(tmp_path / "site")
    said = run(TRAIN, "scheduler=teem", *words, cwd=tmp_path, expect=2, **more)
    assert "scheduler=teem does not exist - did you mean team? There are: cosine" in said
    assert not marker.exists()


def test_a_broken_package_is_named_and_breaks_nothing_else(tmp_path):
    path = install(tmp_path, conf="nopackage.conf", package=False)
    said = run(TRAIN, "scheduler=2", cwd=tmp_path, expect=2, PYTHONPATH=path)
    note, refusal = said.strip().split("\n\n")
    assert note.startswith("note: the installed package of 'nopackage.conf'")
    assert "\n" not in note
    assert "scheduler=2 is no option" in refusal


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config-dir", "nowhere"], "--config-dir: there is no directory '"),
        (["--config-dir"], "--config-dir: there is no directory ''"),
        (["hydra.searchpath=conf"], "hydra.searchpath=conf: it is a list of directories"),
        (["hydra.searchpath=[http://conf]"], "it is a list of directories"),
        (["hydra.searchpath=[pkg://nowhere]"], "there is no directory 'pkg://nowhere'"),
        (["--experimental-rerun", "config.pickle"], "--experimental-rerun of Hydra is not used"),
        (["--config-path=conf"], "--config-path of Hydra is not used here"),
        (["trust.x=1"], "trust.x=1: trust is a list: give trust=[...]"),
    ],
)
def test_a_directory_that_is_not_there_is_refused(tmp_path, flags, words):
    said = run(TRAIN, "scheduler=cosine", *flags, cwd=tmp_path, expect=2)
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_link_of_the_users_that_leads_nowhere_is_named(tmp_path, monkeypatch):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "config.yaml").symlink_to("gone.yaml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"config.yaml: .*No such file"):
        read_user_trust()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe_target_: x.y", "mine.yaml is no UTF-8: save it so"),
        (b"a: [1", "an option's file is no YAML: while parsing a flow sequence in"),
        (b"!!python/object/apply:os.mkdir [made]", "is no YAML: could not determine a constructor"),
        (b"", "scheduler: this option's file names no component"),
        (b"[1, 2]", "scheduler: this option's file names no component"),
        (b"a text", "scheduler: this option's file names no component"),
        (b"# @package _global_\nseed: 1", "scheduler: this option's file names no component"),
        (b"power: ${nowhere}\n_target_: ldm.diffusion.schedules.linear", "'nowhere' not found"),
    ],
)
def test_an_option_that_is_no_component_is_named(tmp_path, monkeypatch, data, words):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "mine.yaml").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config-dir={tmp_path}"])
    with pytest.raises(UsageError, match=re.escape(words)):
        ldm.compose("train", ["scheduler=mine"])
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("guidance=null", "guidance=null is no option of guidance: there are: apg"),
        ("eval=true", "eval=true is no option of eval"),
        ("eval=[]", "eval=[] is no option of eval: there are: fast, full, motion, none"),
        ("eval=[fast,[scenes]]", "is no option of eval"),
        ("callbacks={a:1}", "is no option of callbacks"),
        ("scheduler=../data/scenes", "is no option of scheduler"),
        ("scheduler=/etc/passwd", "is no option of scheduler"),
        ("~eval", "~eval: a setting cannot be left out"),
        ("~scheduler", "~scheduler: a setting cannot be left out"),
        ("~seed", "~seed: a setting cannot be left out"),
        ("=1", "'=1' is no setting"),
        ("model.multipliers.x=1", "model.multipliers is a list"),
        ("trust={a:1}", "trust={a:1} does not fit: "),
        ("hydra.searchpath=[/x]", "the command line takes folders of options"),
    ],
)
def test_what_chooses_no_option_is_refused_in_one_line(word, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        ldm.compose("train", [word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "node", "words"),
    [
        ("scheduler", {"_target_": SINE, "powr": 1}, "takes no 'powr' - did you mean power?"),
        (
            "scheduler",
            {"_target_": SINE, "steps": 1},
            "leave them out with scheduler.steps=0 ~scheduler.steps",
        ),
        ("scheduler", {"_target_": f"{SINE}s"}, "did you mean SineSchedule?"),
        ("scheduler", {"_target_": "teampackage.x.X"}, "there is no such class or function"),
        ("scheduler", {"_target_": "nopackage.X"}, "give PYTHONPATH=FOLDER, where it lies"),
        ("scheduler", {"_target_": "own_noise.broken.X"}, "problem in own_noise.broken - Module"),
        ("scheduler", {"_target_": "nothing"}, "is no name of a class"),
        ("optimizer", {"_target_": "teampackage.training.MomentumOptimizer"}, "give +optimizer.lr"),
        ("sampler", {"_target_": "teampackage.networks.ConvNet"}, "has no timesteps, pair_levels"),
        ("weighting", {"_target_": "teampackage.diffusion.NegativeVelocity"}, "has no __call__"),
        ("model", {"_target_": "teampackage.networks.FoldingAutoencoder"}, "takes no in_channels"),
        ("task", {"_target_": "teampackage.diffusion.FlatNoise", "a": 1}, "It takes no settings"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_in_one_line(place, node, words):
    default = {"_target_": "ldm.diffusion.schedules.cosine", "steps": 1000}
    with pytest.raises(UsageError) as refused:
        check_own_component(node, place, default)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_class_on_the_command_line_leaves_out_what_it_does_not_take():
    words = [f"scheduler._target_={SINE}", "+scheduler.power=2", "scheduler.steps=5"]
    rest = [f"scheduler.{key}" for key in ("offset", "max_beta", "zero_terminal_snr")]
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        assert list_replaced_settings(words, "train") == {SINE: rest}
        assert list_replaced_settings(["scheduler=cosine", "name=x"], "train") == {}


def test_a_class_of_an_option_is_not_given_a_later_setting_of_ours(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("def make_net(channels, multipliers, **sizes): ...\n")
    (tmp_path / "old_net.py").write_text("def make_net(channels, multipliers): ...\n")
    (tmp_path / "model").mkdir()
    for name in ("own", "old"):
        text = f"defaults: [tiny]\n_target_: {name}_net.make_net\n"
        (tmp_path / "model" / f"{name}.yaml").write_text(text)
    flag = f"--config-dir={tmp_path}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", flag])
    left = {"old_net.make_net": ["model.checkpointing"]}
    assert list_replaced_settings([flag, "model=old"], "train") == left
    for words in (["model=own"], ["model=old", "model.checkpointing=all"], ["model=tiny"]):
        assert list_replaced_settings([flag, *words], "train") == {}


def test_a_setting_of_such_a_class_is_added(monkeypatch):
    words = ["train.py", f"scheduler._target_={SINE}", "scheduler.power=2"]
    monkeypatch.setattr(sys, "argv", words)
    said = format_unknown_setting("scheduler.power", "train")
    assert said == (
        "there is no setting 'scheduler.power' of the chosen option: one that "
        f"{SINE} takes is added, +scheduler.power=..."
    )


def test_the_users_configuration_file_trusts_packages_for_all_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert list_trusted_packages({"trust": "a"}) == ("a",)
    file = tmp_path / "ldm" / "config.yaml"
    file.parent.mkdir()
    file.write_text("trust: [b, a]\n")
    assert list_trusted_packages({"trust": ["a"]}) == ("a", "b")
    for text in ("", "# trust: [mypackage]\n", "trust:"):
        file.write_text(text)
        assert read_user_trust() == []
    for text in ("trust: 5", "trust: [b.c]", "truth: [b]", "[", "- b", "trust: !!python/name:os"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"config.yaml: .* It holds one line, trust: \["):
            list_trusted_packages({})
