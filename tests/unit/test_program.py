"""The program `ldm`, its name in messages, and the package as Python code sees it."""

import re
import sys

import pytest
from shell import ROOT, run

import ldm
import ldm.utils.errors as errors
from ldm.__main__ import VERBS
from ldm.utils.errors import format_program, program_name

CLI = ROOT / "ldm" / "cli"


def test_each_file_of_cli_that_has_a_main_is_a_verb():
    main = re.compile(r"^(def main\(|main = )", re.MULTILINE)
    mains = {path.stem for path in CLI.glob("*.py") if main.search(path.read_text())}
    assert mains == set(VERBS)


def test_the_verbs_are_listed(tmp_path):
    printed = run("-m", "ldm", cwd=tmp_path)
    assert run("-m", "ldm", "--help", cwd=tmp_path) == printed
    assert all(f"  {verb} " in printed for verb in VERBS)
    printed = run("-m", "ldm", "evalaute", cwd=tmp_path, expect=2)
    assert printed.startswith("ldm: there is no verb 'evalaute' - did you mean evaluate?")


@pytest.mark.parametrize(
    ("program", "command", "name"),
    [
        ("train.py", ["python", "train.py"], "train.py"),
        (f"{CLI}/compare.py", ["python", "-m", "ldm.compare", "runs/a"], "python -m ldm.compare"),
        (f"{CLI}/compare.py", ["python", "/bin/ldm", "compare", "runs/a"], "ldm compare"),
    ],
)
def test_a_message_begins_with_the_program_as_typed(monkeypatch, program, command, name):
    monkeypatch.setattr(sys, "argv", [program, "runs/a"])
    monkeypatch.setattr(sys, "orig_argv", command)
    assert program_name() == name


@pytest.mark.parametrize(
    ("command", "checkout", "typed"),
    [
        (["python", "sample.py"], True, "python train.py"),
        (["python", "/bin/ldm", "sample"], True, "ldm train"),
        (["python", "-m", "ldm.sample"], False, "ldm train"),  # a wheel has no train.py
    ],
)
def test_a_message_names_a_train_command_that_works_here(
    monkeypatch, tmp_path, command, checkout, typed
):
    monkeypatch.setattr(
        sys, "argv", ["sample.py" if "sample.py" in command else f"{CLI}/sample.py"]
    )
    monkeypatch.setattr(sys, "orig_argv", command)
    if not checkout:
        monkeypatch.setattr(errors, "CLI_DIR", tmp_path / "ldm" / "cli")
    assert format_program("train") == typed


def test_help_shows_commands_as_typed(tmp_path):
    assert "\n  ldm train name=first " in run("-m", "ldm", "train", "--help", cwd=tmp_path)
    said = run(str(ROOT / "sample.py"), "--help", cwd=tmp_path)
    assert "\n  python sample.py ckpt=runs/first " in said


def test_the_import_of_ldm_is_quick(tmp_path):
    heavy = "import sys, ldm; print({'torch', 'hydra', 'numpy'} & sys.modules.keys())"
    assert run("-c", heavy, cwd=tmp_path) == "set()\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ldm.lode
    assert set(ldm.__all__) <= {*dir(ldm), *ldm._MODULES}


@pytest.mark.parametrize(("shadowed", "safe"), [(False, "None"), (True, "1")])
def test_files_of_the_folder_shadow_nothing_in_jobs_that_ldm_starts(tmp_path, shadowed, safe):
    """`python -m ldm` has the folder on its path, and so have its jobs; `ldm` has not."""
    code = "import os, sys; from ldm.__main__ import main; "
    code += "sys.argv = ['ldm', '-h']; " + ("sys.path.remove(''); " if shadowed else "")
    code += "" if shadowed else "sys.path.insert(0, os.getcwd()); "
    code += "main(); print(os.environ.get('PYTHONSAFEPATH'))"
    assert run("-c", code, cwd=tmp_path).splitlines()[-1] == safe


def test_a_mistake_is_printed_before_torch_is_imported():
    """And the modules of the verbs leave the command line as it was."""
    verbs = [f"ldm.cli.{verb}" for verb in VERBS]
    code = f"import sys; words = list(sys.argv); import {', '.join(verbs)}; "
    code += "print({'torch', 'lightning'} & sys.modules.keys(), sys.argv == words)"
    assert run("-c", code, "name=x", cwd=ROOT) == "set() True\n"


def test_runs_are_compared_without_torch():
    """All that `ldm compare` imports, its pages of images as well."""
    modules = "ldm.cli.compare, ldm.experiments.plots, ldm.utils.images, ldm.utils.plots"
    assert run("-c", f"import sys, {modules}; print('torch' in sys.modules)", cwd=ROOT) == "False\n"


def test_load_takes_the_settings_of_sample_and_raises_value_errors(tmp_path):
    """Those of former names as well; each mistake is one of the words, not of the checkpoint."""
    for words, message in (
        (["sampler=lcm", "sampler.origin=50"], "neither a run directory nor a file"),
        (["guidance.scal=3"], "there is no setting 'guidance.scal' - did you mean guidance.scale"),
        (["trust=5"], "trust=5 is no name of a package"),
        (["guidance=7"], "guidance=7 is no option of guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            ldm.load(tmp_path / "gone", *words)
