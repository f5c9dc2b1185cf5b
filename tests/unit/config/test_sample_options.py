"""What sample.py is asked for, before anything is loaded."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from shell import run

import ldm
from ldm.config import command_line
from ldm.config.command_line import read_prompts
from ldm.config.config_check import check_config
from ldm.config.sample_options import (
    SAMPLE_TEXT_OPTIONS,
    check_output_fits_run,
    check_sample_options,
    list_cascade_runs,
    list_lora_files,
    print_to_stderr,
)
from ldm.config.suggestions import format_unknown_setting
from ldm.utils.errors import UsageError


def check(*words):
    """`check_sample_options` of a command line whose numbers are right."""
    typed = dict(
        word.split("=", 1) for word in words if word.partition("=")[0] in SAMPLE_TEXT_OPTIONS
    )
    others = [word for word in words if word.partition("=")[0] not in SAMPLE_TEXT_OPTIONS]
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("sample", overrides=others)
        check_config(cfg, "sample", others)
    options = {name: cfg[name] for name in SAMPLE_TEXT_OPTIONS} | typed
    return check_sample_options(cfg, options, has_prompt="prompt" in typed)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "m.png", "p.txt"):
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "n=0",
        "n=null",
        "n=true",
        "n=1.5",
        "seed=-1",
        "seed=1.5",
        "seed=99999999999999999999",
        "steps=0",
        "batch=0",
        "previews=-1",
        "size=-64",
        "size=[64,64,64]",
        "frames=0",
        "frames=-3",
        "frames=2.5",
        "fps=0",
        "fps=-3",
        "fps=nan",
        "fps=null",
        "strength=0",
        "strength=1.5",
        "pad=16",
        "pad=[1,2]",
        "pad=[-1,0,0,0]",
        "pad=[1000000,0,0,0]",
        "image=gone.png",
        "image=.",
        "mask=gone.png",
        "style=gone.png",
        "prompts=gone.txt",
        "out=a.jpg",
        "out=runs/a.mp5",
        "out=" + "n" * 236 + ".png",
        "ckpt=a cascade=[a,b]",
        "prompt=x prompts=p.txt",
        "source=x",
        "source=x task=img2img image=a.png",
        "paste=true",
    ],
)
def test_what_cannot_be_meant_is_one_line_with_its_name(home, words):
    first = words.split()[0]
    with pytest.raises(UsageError) as error:
        check(*words.split())
    said = str(error.value)
    assert first.partition("=")[0] in said
    assert "\n" not in said


def test_what_can_be_meant_passes(home, capsys):
    got = check("image=~/a.png", "mask=m.png", "paste=true", "ckpt=~/runs/x", "out=~/o/", "n=1")
    assert (got["image"], got["ckpt"]) == (f"{home}/a.png", f"{home}/runs/x")
    assert got["mask"] == "m.png"
    assert got["prompt"] == ""
    check("image=a.png", "pad=[16,0,16,0]", "size=[64,96]", "frames=3", "fps=12.5", "paste=true")
    assert not capsys.readouterr().err
    check("image=a.png", "task=img2img", "task.invert=true")
    assert "without source" in capsys.readouterr().err
    check("guidance=style")
    assert "nothing without style=FILE" in capsys.readouterr().err


def test_a_cascade_of_one_needs_no_brackets(home):
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        for word, wanted in (
            ("cascade='~/base'", [f"{home}/base"]),
            ("cascade=[runs/a,'~/b']", ["runs/a", f"{home}/b"]),
            ("cascade=[]", []),
        ):
            assert list_cascade_runs(compose("sample", overrides=[word])) == wanted


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("task.scale", "there is task.scale of superres: add task=superres"),
        ("task.rounds", "add task=inpaint_projected"),
        ("guidance.style_scale", "guidance.style_scale of style: add guidance=style"),
        ("guidance.scale_style", "guidance.style_scale of style: add guidance=style"),
    ],
)
def test_a_setting_of_another_option_comes_with_that_option(key, hint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    assert hint in format_unknown_setting(key, "sample")


def test_ctrl_c_is_one_line(tmp_path):
    code = "import sys; from ldm.config import command_line as cli\n"
    code += "def main(): raise KeyboardInterrupt\n"
    code += "sys.argv = ['a/sample.py']; cli.run_command(main, 'sample', resumable={})"
    for goes_on, more in ((False, ""), (True, "; the same command goes on from here")):
        said = run("-c", code.format(goes_on), cwd=tmp_path, expect=130)
        assert said == f"\nsample.py: interrupted{more}\n"


def test_prompts_that_are_no_text_are_named(home):
    Path("p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"prompts=p\.txt is neither UTF-8 nor UTF-16"):
        read_prompts({"prompt": "", "prompts": "p.txt"})


def test_size_and_suffix_are_refused_by_the_settings_of_the_run(tmp_path):
    """Without torch; what cannot be read there is left to whoever loads the checkpoint."""
    settings = "autoencoder: {_target_: ldm.x, patch: 2, multipliers: [1, 2]}\n"
    settings += "model: {_target_: ldm.y, multipliers: [1, 2, 4]}\n"
    tmp_path.joinpath("config.yaml").write_text(settings + "data: {size: 64, frames: 8}\n")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    for ckpt in (str(tmp_path), str(checkpoint)):
        check_output_fits_run(ckpt, size=32, out="a.gif")
        with pytest.raises(UsageError, match=r"size=40: this run .* multiples of 16: size=48"):
            check_output_fits_run(ckpt, size=40, out=None)
        with pytest.raises(UsageError, match=r"out=a\.png: videos are written as"):
            check_output_fits_run(ckpt, size=None, out="a.png")
    tmp_path.joinpath("config.yaml").write_text(settings.replace("ldm.y", "own.y") + "data: {}\n")
    check_output_fits_run(str(tmp_path), size=40, out="a.png")
    for damaged in ("[", "data: 3", "data: {}\nautoencoder: 3", "x: " + "[" * 99):
        tmp_path.joinpath("config.yaml").write_text(damaged)
        check_output_fits_run(str(tmp_path), size=40, out="a.gif")


def test_one_process_prints_a_note(monkeypatch, capsys):
    print_to_stderr("of the first")
    monkeypatch.setenv("RANK", "1")
    print_to_stderr("of the second")
    assert capsys.readouterr().err == "of the first\n"


def test_a_lora_file_may_have_a_colon_in_its_name(home):
    for name in ("a:b.safetensors", "c:0.5"):
        Path(name).touch()
    entries = ["a:b.safetensors", "a:b.safetensors:2", "c:0.5"]
    assert [weight for _, weight in list_lora_files({"lora": entries})] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("entry", ["", ":", "a:abc", "a:inf", "a:nan", "a:1e400"])
def test_a_lora_entry_without_file_or_number_is_refused(home, entry):
    with pytest.raises(UsageError, match="give FILE or FILE:WEIGHT"):
        list_lora_files({"lora": [entry]})


def test_one_lora_file_needs_no_list(tmp_path):
    file = tmp_path / "a.safetensors"
    file.touch()
    for given in (f"{file}:0.5", [f"{file}:0.5"]):
        assert list_lora_files({"lora": given}) == [(file, 0.5)]
    assert list_lora_files({"lora": None}) == []
    for words, more in ((["lora=b.safetensors"], ()), (["lora=null"], Path("b.safetensors"))):
        with pytest.raises(UsageError, match=r"lora=b.safetensors: there is no such file"):
            ldm.load(tmp_path, *words, lora=more)
    (tmp_path / "lora.safetensors").touch()
    with pytest.raises(UsageError, match=rf"is a folder, not a file: give lora={tmp_path}/lora.s"):
        ldm.load(tmp_path, lora=tmp_path)
