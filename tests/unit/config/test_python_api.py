"""`import ldm` as a script or a notebook uses it."""

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from team import OUTSIDE

import ldm
from ldm.config.composition import CONF_DIR
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.samplers.multistep import DPMSolverSampler

BRIEF = [
    *("data.count=8", "data.val_count=8", "data.batch_size=4", "data.workers=0", "trainer=cpu"),
    *("samples.n=0", "eval=none", "logger=csv", "validate_first=false", "trainer.max_steps=1"),
]
PROMPT = "a big red heart above a little cyan star, striped, on a navy background"


def read_process_state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    seeds = torch.random.get_rng_state().tolist(), random.getstate()
    return {
        "folder": os.getcwd(),
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "handlers": handlers,
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "hydra": GlobalHydra.instance().hydra,
        "warnings": list(warnings.filters),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a sweep's worth of two runs that `ldm.train` made."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    try:
        for scheduler in ("cosine", "linear"):
            words = [*BRIEF, f"scheduler={scheduler}", f"name=pair/{scheduler}"]
            result = ldm.train(ldm.compose("train", words))
            assert result["run_dir"] == f"runs/pair/{scheduler}"
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _in_home(request, monkeypatch):
    if "home" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("home"))


@pytest.fixture(scope="module")
def pipe(home):
    return ldm.load(home / "runs" / "pair" / "cosine")


def test_compose_takes_a_class_in_place_of_an_options_own(monkeypatch, capsys):
    monkeypatch.syspath_prepend(OUTSIDE)
    sampler = "teampackage.diffusion.PlainEulerSampler"
    cfg = ldm.compose("train", [f"sampler._target_={sampler}"])
    left = {"_target_": sampler, "spacing": "trailing"}
    assert cfg.sampler == left, "the null settings of ddim are left out, too"
    note = capsys.readouterr().err
    assert f"{sampler} takes no sampler.eta, sampler.offset, " in note
    assert "sampler.clip, sampler.quantile: left out" in note


def test_compose_gives_the_settings_of_the_command_line():
    cfg = ldm.compose("train", ["scheduler=linear", "name=x"])
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        expected = compose("train", ["scheduler=linear", "name=x"])
    assert {key: cfg[key] for key in expected} == {key: expected[key] for key in expected}
    assert cfg.hydra.overrides.task == ["scheduler=linear", "name=x"]


def test_a_run_without_a_name_is_called_by_the_time(monkeypatch):
    monkeypatch.delenv("LDM_RUN_STAMP", raising=False)
    cfg = ldm.compose("train")
    monkeypatch.setattr("time.strftime", lambda format: "later")
    assert cfg.name == cfg.name != ldm.compose("train").name == "later"


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("trian", [], "there is no command 'trian' - did you mean train"),
        ("train", ["schedulr=linear"], "no setting 'schedulr' - did you mean scheduler"),
        ("train", ["scheduler=lineer"], "scheduler=lineer does not exist - did you mean linear"),
        ("train", ["trainer.max_steps=-5"], "trainer.max_steps=-5 must be a whole number"),
        ("train", ["name=../x"], "names no run"),
        ("sample", ["guidance=7"], "guidance.scale=7 sets the number"),
    ],
)
def test_compose_refuses_what_the_command_line_refuses(command, words, message):
    with pytest.raises(ldm.UsageError, match=message):
        ldm.compose(command, words)


def test_it_works_inside_of_another_hydra_application():
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        own = GlobalHydra.instance().hydra
        ldm.compose("sample", ["sampler=heun"])
        with pytest.raises(ldm.UsageError):
            ldm.compose("sample", ["sampler=hoin"])
        assert GlobalHydra.instance().hydra is own


def test_a_run_is_that_of_the_command_line(home):
    run = home / "runs" / "pair" / "linear"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert "hydra" not in (run / "config.yaml").read_text()
    assert "scheduler=linear" in (run / ".hydra" / "overrides.yaml").read_text()


def test_train_leaves_the_process_as_it_was(home, capsys):
    before = read_process_state()
    cfg = ldm.compose("train", [*BRIEF, "name=again"])
    cfg.trainer.max_steps = 2
    assert ldm.train(cfg)["steps"] == 2
    assert read_process_state() == before
    assert ldm.train(cfg)["steps"] == 2
    assert "runs/again is finished" in capsys.readouterr().out


def test_a_refused_run_leaves_no_folder_and_a_changed_one_is_not_resumed(home):
    with pytest.raises(ldm.UsageError, match="init='runs/gone' is neither a run directory"):
        ldm.train(ldm.compose("train", [*BRIEF, "name=new/one", "init=runs/gone"]))
    assert not Path("runs/new").exists()
    changed = ldm.compose("train", [*BRIEF, "scheduler=linear", "name=pair/cosine"])
    with pytest.raises(ldm.UsageError, match="was started with other settings: scheduler"):
        ldm.train(changed)
    changed.trainer.max_steps = 0
    with pytest.raises(ldm.UsageError, match=r"trainer.max_steps=0 must be"):
        ldm.train(changed)
    with pytest.raises(ldm.UsageError, match=r"give the configuration of ldm.compose"):
        ldm.train(ldm.compose("train")["trainer"])
    with pytest.raises(ldm.UsageError, match=r"give the configuration of ldm.compose"):
        ldm.train({"name": "x"})


def test_ctrl_c_saves_and_raises_keyboard_interrupt(home):
    cfg = ldm.compose("train", [*BRIEF, "trainer.max_steps=100000", "name=stopped"])

    def interrupt():
        file = Path("runs/stopped/metrics.csv")  # has a line for each step
        while not file.exists() or file.read_text().count("\n") < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    cfg.trainer.log_every_n_steps = 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ldm.train(cfg)
    finally:
        signal.signal(signal.SIGINT, before)
    result = json.loads(Path("runs/stopped/result.json").read_text())
    assert result["status"] == "preempted"
    assert Path("runs/stopped", result["checkpoint"]).is_file()


def test_a_pipeline_gives_pil_images_of_each_prompt_and_seed(pipe):
    before = read_process_state()
    images = pipe([PROMPT, "a blue star"], seeds=[0, 1], steps=2)
    assert [image.size for image in images] == 4 * [(64, 64)]
    tensor = pipe([PROMPT, "a blue star"], seeds=[0, 1], steps=2, output_type="pt")
    exact = pipe.pipeline(2 * [PROMPT], seeds=[0, 1], size=64, steps=2)
    assert torch.allclose(tensor[:2], exact, atol=1e-4)
    assert read_process_state() == before
    [one] = pipe(PROMPT, steps=2, progress=False)
    assert one.tobytes() == images[0].tobytes()


def test_options_go_by_name_or_as_objects(pipe):
    def generate(**options):
        return pipe(PROMPT, steps=2, output_type="pt", progress=False, **options)

    assert torch.equal(generate(sampler="dpmpp_2m"), generate(sampler=DPMSolverSampler()))
    by_name = generate(guidance="cfg", guidance_scale=3)
    assert torch.equal(generate(guidance_scale=3), by_name)
    assert torch.equal(generate(guidance=ClassifierFreeGuidance(scale=3.0)), by_name)
    assert not torch.equal(generate(), by_name)


def test_images_start_from_files_and_from_images_in_memory(pipe, tmp_path):
    [start] = pipe(PROMPT, steps=1, progress=False)
    start.save(tmp_path / "start.png")
    mask = Image.new("L", start.size)
    mask.paste(255, (0, 0, 32, 64))
    how = {"task": "inpaint_projected", "mask": mask, "steps": 2, "paste": True}
    [one] = pipe("a star", image=start, progress=False, **how)
    [two] = pipe("a star", image=tmp_path / "start.png", progress=False, **how)
    assert one.tobytes() == two.tobytes() != start.tobytes()
    right = (32, 0, 64, 64)
    assert one.crop(right).tobytes() == start.crop(right).tobytes()
    pipe("a star", task="img2img", image=start, strength=0.5, steps=2, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number"),
        ({"seeds": [-1]}, "seed=-1 must be"),
        ({"size": 30}, "size=30: this run generates multiples of 16: size=32"),
        ({"size": "big"}, "size=.* must be"),
        ({"sampler": "ddmi"}, "sampler=ddmi does not exist - did you mean"),
        ({"guidance_scale": "3"}, "guidance.scale=3 must be a number"),
        ({"guidance": ClassifierFreeGuidance(scale=1.0), "guidance_scale": 3}, "has its own"),
        ({"task": "inpaint", "image": Image.new("RGB", (64, 64))}, "was not trained with masks"),
        ({"task": "img2img", "image": "gone.png"}, "image=gone.png: No such file"),
        ({"mask": Image.new("L", (8, 8))}, "image=FILE"),
        ({"output_type": "np"}, "output_type=np is neither pil nor pt"),
    ],
)
def test_a_pipeline_refuses_by_name(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, progress=False, **{"steps": 1, **options})


def test_load_takes_settings_that_are_no_arguments_of_the_call(home):
    pipe = ldm.load("runs/pair/cosine", "raw=true", "sampler=heun", dtype=torch.bfloat16)
    assert pipe.settings["weights"] == "raw"
    assert pipe.precision == "bfloat16"
    for dtype in ("bfloat16", "float32"):
        assert ldm.load("runs/pair/cosine", dtype=dtype).precision == dtype
        assert ldm.load("runs/pair/cosine", f"dtype={dtype}").precision == dtype
    assert ldm.load("runs/pair/cosine", device="cpu").precision == "float32"
    for word in ("steps=3", "prompt=x"):
        with pytest.raises(ldm.UsageError, match=f"{word} is no setting of ldm.load"):
            ldm.load("runs/pair/cosine", word)
    with pytest.raises(ldm.UsageError, match="device=cuda:99 is not here"):
        ldm.load("runs/pair/cosine", device="cuda:99")
    with pytest.raises(ldm.UsageError, match=r"dtype=int8 must be one of float32, bfloat16"):
        ldm.load("runs/pair/cosine", dtype=torch.int8)


def test_a_pipeline_is_shown_in_one_line(pipe):
    assert repr(pipe) == f"LoadedPipeline('{pipe.path}', step=1, task='text2img', device='cpu')"


def test_evaluate_gives_the_metrics_of_the_command(home):
    before = read_process_state()
    metrics = ldm.evaluate("runs/pair/cosine", "features=none", "count=2", "steps=1")
    assert read_process_state() == before
    written = json.loads(Path("runs/pair/cosine/metrics.json").read_text())
    assert metrics == written["metrics"]
    with pytest.raises(ldm.UsageError, match="steps=1,2: it takes one value here"):
        ldm.evaluate("runs/pair/cosine", "steps=1,2")
    with pytest.raises(ldm.UsageError, match=r"give ckpt=... \(a run"):
        ldm.evaluate()


def test_runs_are_rows_of_plain_values(home):
    rows = ldm.read_runs("runs/pair")
    assert [row["run"] for row in rows] == ["cosine", "linear"]
    assert [row["scheduler"] for row in rows] == ["cosine", "linear"]
    for row in rows:
        assert (row["status"], row["metric"], row["steps"]) == ("finished", "val/loss", 1)
        assert row["value"] == pytest.approx(row["val/loss"])
        assert Path(row["checkpoint"]).is_file()
    assert ldm.read_runs("runs/pair/cosine")[0]["run"] == "cosine"
    with pytest.raises(ldm.UsageError, match="neither a run nor a folder with runs"):
        ldm.read_runs("gone")
