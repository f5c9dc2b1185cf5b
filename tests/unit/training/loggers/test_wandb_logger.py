"""W&B with no key, no network, a server: what lies on disk and what arrives."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import wandb_files
from PIL import Image
from wandb_server import serving

from ldm.training.loggers.wandb import has_wandb_key, wandb_logger

ROOT = Path(__file__).parents[4]
OVERRIDES = ["scheduler=cosine", "optimizer.lr=1e-3", f"samples.prompts=[{'red ' * 30}ball]"]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a call would fail at once
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")


@pytest.fixture
def server(monkeypatch):
    """A W&B server, and a key for it."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


def login(file: Path, host: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    file.chmod(0o644)


def log_steps(run_dir: Path, steps: range, *, failed: bool = False, **settings) -> None:
    """One start of a run that logs as a training does."""
    settings = {"name": "demo/scheduler=cosine", "overrides": OVERRIDES} | settings
    logger = wandb_logger(run_dir=run_dir, **settings)
    try:
        logger.log_hyperparams({"optimizer": {"lr": 1e-3}, "seed": 0})
        for step in steps:
            logger.log_metrics({"train/loss": 1 / (step + 3), "images_seen": 4 * step}, step=step)
        logger.log_metrics({"val/loss": 0.25}, step=steps[-1])
        logger.log_image("samples", [Image.new("RGB", (4, 4), "red")], step=steps[-1])
        logger.log_table("ranking", ["run", "val/loss"], [["a=b", 0.5], ['<c>:|?*"', None]])
        logger.finish(status="failed" if failed else "finished")
    finally:
        wandb.teardown()


def test_tags_are_what_a_sweep_varies_and_those_of_the_user(tmp_path):
    def tags(name, **settings):
        return wandb_logger(run_dir=tmp_path, name=name, overrides=OVERRIDES, **settings).run[
            "tags"
        ]

    assert tags("alone") is None
    assert tags("alone", tags="baseline") == ["baseline"]
    assert tags("demo/optimizer.lr=1e-3", tags=["x", "x"]) == ["optimizer.lr=1e-3", "x"]
    long = f"demo/samples.prompts=-red-red~{'0' * 6},scheduler=cosine"  # a label with a digest
    assert tags(long) == ["scheduler=cosine", f"{OVERRIDES[2][:61]}..."]
    assert tags("demo/data.optimizer.lr=1e-3") is None


SETTINGS = {
    "entity": "team",
    "project": "faces",
    "group": "night",
    "job_type": "train",
    "notes": "first try",
    "tags": ["a", "b"],
}


@pytest.mark.parametrize("by", ["settings", "environment", "both"])
def test_settings_come_before_the_environment_and_that_before_ours(tmp_path, monkeypatch, by):
    names = {"group": "WANDB_RUN_GROUP"}
    if by != "settings":
        for name, value in SETTINGS.items():
            other = value if by == "environment" else ["other"]
            text = ",".join(other) if isinstance(other, list) else other
            monkeypatch.setenv(names.get(name, f"WANDB_{name.upper()}"), text)
        monkeypatch.setenv("WANDB_MODE", "offline" if by == "environment" else "online")
    given = {} if by == "environment" else SETTINGS | {"mode": "offline"}
    log_steps(tmp_path, range(1), **given)
    (run,) = wandb_files.of_run(tmp_path)
    found = {name: getattr(run, name) for name in SETTINGS}
    assert found == SETTINGS | {"tags": ["scheduler=cosine", "a", "b"]}


def test_a_run_can_be_without_wandb(tmp_path, capsys):
    log_steps(tmp_path, range(1), mode="disabled")
    assert not wandb_files.of_run(tmp_path)
    assert "W&B" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"mode": "of"}, {"artifact": "last"}])
def test_an_unknown_mode_or_artifact_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"logger.wandb.(mode=of is none of on|artifact=last is)"):
        wandb_logger(run_dir=tmp_path, name="x", overrides=[], **wrong)


def test_alerts_and_the_best_checkpoint_are_in_the_file(tmp_path):
    best = tmp_path / "checkpoints" / "step=00000002.ckpt"
    best.parent.mkdir()
    best.write_bytes(b"weights")
    best.with_name("best.ckpt").symlink_to(best.name)
    logger = wandb_logger(run_dir=tmp_path, name="x", overrides=[], artifact="best")
    logger.log_metrics({"val/loss": 1.0}, step=2)
    logger.alert("run preempted", "at step 2")
    logger.alert("run failed", "ValueError: x")
    logger.finish(status="failed")
    wandb.teardown()
    (run,) = wandb_files.of_run(tmp_path)
    assert run.alerts == [
        ("WARN", "run preempted", "at step 2"),
        ("ERROR", "run failed", "ValueError: x"),
    ]
    assert run.artifacts == {f"checkpoint-{run.id}": [f"file://{best}"]}


def test_a_copied_run_directory_gets_a_run_of_its_own(tmp_path, server, capsys):
    log_steps(tmp_path / "first", range(3))
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    log_steps(tmp_path / "copy", range(3, 5))
    assert "copy is a copy of" in capsys.readouterr().out
    first, copy = ((tmp_path / name / "wandb_id").read_text().strip() for name in ("first", "copy"))
    assert set(server.runs) == {first, copy}
    losses = [row for row in server.runs[first].history.values() if "train/loss" in row]
    assert len(losses) == 3, "the original got nothing"
    assert copy in (tmp_path / "copy" / "wandb_url").read_text()


def test_a_job_of_a_sweep(tmp_path, capsys):
    """Group, name, tags, configuration, metrics and pictures of a run without a key."""
    run_dir = tmp_path / "my runs" / "scheduler=cosine"
    log_steps(run_dir, range(3), failed=True)
    where = f"`wandb sync '{run_dir}/wandb/'offline-run-*`"
    assert f"W&B is offline; {where}" in capsys.readouterr().out
    (run,) = wandb_files.of_run(run_dir)
    assert run.id == (run_dir / "wandb_id").read_text().strip()
    assert (run.project, run.group, run.name) == ("ldm", "demo", "scheduler=cosine")
    assert run.tags == ["scheduler=cosine"], "what sets it apart in the sweep"
    assert run.config["overrides"] == dict(text.split("=") for text in OVERRIDES)
    assert run.config["optimizer"] == {"lr": 1e-3}
    assert run.series("train/loss") == {step: 1 / (step + 3) for step in range(3)}
    assert run.exit_code == 1
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    (picture,) = (offline / "files" / "media" / "images").glob("samples_*.png")
    with Image.open(picture) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    (table,) = (offline / "files" / "media" / "table").glob("ranking*.json")
    assert '["<c>:|?*\\"",null]' in table.read_text()


def test_results_are_plotted_against_images_seen(tmp_path):
    log_steps(tmp_path, range(3))
    (run,) = wandb_files.of_run(tmp_path)
    step = "trainer/global_step"  # its own axis; and no two globs fit one name: W&B takes any
    steps = {"train/*": step, "perf/*": step, "eval/*": step, "images_seen": step}
    assert run.axes == {step: "", **steps, "val/*": "images_seen", "samples": "images_seen"}
    assert run.series("val/loss", "images_seen") == {8: 0.25}
    (picture,) = run.series("samples/_type", "images_seen")
    assert picture == 8


def test_names_and_overrides_of_a_single_run(tmp_path):
    log_steps(tmp_path, range(1), name="first", overrides=["a=1", "a=1"])
    (run,) = wandb_files.of_run(tmp_path)
    assert (run.group, run.name, run.tags) == ("", "first", [])


def test_a_resumed_run_goes_on_offline(tmp_path):
    """Two starts and one run, on disk and on the server that gets them in the end."""
    log_steps(tmp_path, range(3))
    log_steps(tmp_path, range(2, 5))
    first, second = wandb_files.of_run(tmp_path)
    assert first.id == second.id
    assert set(first.series("train/loss")) == {0, 1, 2}
    assert set(second.series("train/loss")) == {2, 3, 4}
    assert first.series("train/loss")[2] == second.series("train/loss")[2]


def test_runs_do_not_mix_in_one_process(tmp_path):
    loggers = [wandb_logger(run_dir=tmp_path / n, name=n, overrides=[]) for n in ("a", "b")]
    for value, logger in enumerate(loggers):
        logger.log_metrics({"val/loss": float(value)}, step=1)
    loggers[1].finish(status="finished")
    loggers[0].finish(status="finished")
    wandb.teardown()
    for value, name in enumerate(("a", "b")):
        (run,) = wandb_files.of_run(tmp_path / name)
        assert run.series("val/loss") == {1: value}


def test_a_server_gets_one_run_of_two_starts(tmp_path, server):
    log_steps(tmp_path, range(3))
    assert (tmp_path / "wandb_url").read_text().startswith(server.url)
    log_steps(tmp_path, range(3, 5), failed=True)
    ((name, run),) = server.runs.items()
    assert name == (tmp_path / "wandb_id").read_text().strip()
    assert (run.about["groupName"], run.about["displayName"]) == ("demo", "scheduler=cosine")
    losses = [row["train/loss"] for row in run.history.values() if "train/loss" in row]
    assert losses == [1 / (step + 3) for step in range(5)]
    assert run.exit_code == 1


def test_a_run_that_the_server_lost_is_not_created_twice(tmp_path, server, capsys):
    log_steps(tmp_path, range(3))
    server.runs.clear()
    log_steps(tmp_path, range(3, 5))
    assert not server.runs
    assert "does not exist" in capsys.readouterr().out
    assert [run.id for run in wandb_files.of_run(tmp_path)] == 3 * [
        (tmp_path / "wandb_id").read_text().strip()
    ]  # begun, refused, offline


def test_an_offline_run_can_be_synced_later(tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(tmp_path, range(3))
    log_steps(tmp_path, range(3, 5))
    monkeypatch.delenv("WANDB_MODE")
    command = f"{sys.executable} -m wandb sync '{tmp_path}/wandb/'offline-run-*"
    done = subprocess.run(
        command, cwd=tmp_path, shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = server.runs.values()
    assert [row["train/loss"] for row in run.history.values() if "train/loss" in row] == [
        1 / (step + 3) for step in range(5)
    ]


@pytest.mark.parametrize("trouble", ["refuses", "hangs", "wrong key", "no key at all"])
def test_a_run_does_not_wait_for_a_server(tmp_path, monkeypatch, capsys, trouble):
    monkeypatch.setenv("WANDB_API_KEY", "wrong" if trouble == "no key at all" else "0" * 40)
    with serving() as server, socket.create_server(("127.0.0.1", 0)) as deaf:
        server.status = 401
        if trouble == "hangs":
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        elif trouble == "wrong key":
            monkeypatch.setenv("WANDB_BASE_URL", server.url)
        began = time.perf_counter()
        log_steps(tmp_path, range(3))
    assert time.perf_counter() - began < 20  # an order below the 90 s that W&B waits by itself
    said = capsys.readouterr().out
    assert "W&B cannot be used: " in said
    assert "`wandb sync " in said
    run = wandb_files.of_run(tmp_path)[-1]
    assert set(run.series("train/loss")) == {0, 1, 2}
    assert not (tmp_path / "wandb_url").exists(), "no server had it"


def test_a_server_that_dies_does_not_disturb_the_run(tmp_path, server, capsys):
    logger = wandb_logger(run_dir=tmp_path, name="first", overrides=[])
    logger.log_metrics({"train/loss": 1.0}, step=0)
    server.shutdown()
    server.server_close()
    began = time.perf_counter()
    for step in range(1, 9):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    assert time.perf_counter() - began < 2
    logger.finish(status="finished")
    wandb.teardown()
    assert time.perf_counter() - began < 20
    assert "`wandb sync --include-online " in capsys.readouterr().out
    (run,) = wandb_files.of_run(tmp_path)
    assert set(run.series("train/loss")) == set(range(9))


def test_without_a_home_directory_a_run_is_offline(monkeypatch, tmp_path):
    def nobody(number: int):
        raise KeyError(number)

    monkeypatch.setenv("HOME", "")  # is put back afterwards
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert not has_wandb_key()
    log_steps(tmp_path, range(3))
    (run,) = wandb_files.of_run(tmp_path)
    assert set(run.series("train/loss")) == {0, 1, 2}


def test_a_dead_wandb_process_does_not_stop_the_training(tmp_path, capsys):
    logger = wandb_logger(run_dir=tmp_path, name="first", overrides=[])
    logger.log_metrics({"train/loss": 1.0}, step=0)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.is_file():
        pytest.skip("children cannot be listed here")
    for child in children.read_text().split():
        if "wandb" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    time.sleep(0.5)
    for step in range(1, 5):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finish(status="finished")
    assert "`wandb sync " in capsys.readouterr().out
    with pytest.raises(ConnectionError):
        wandb.teardown()


@pytest.mark.slow
def test_a_killed_run_can_be_read(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ldm.training.loggers.wandb import wandb_logger\n"
        "log = wandb_logger(run_dir=Path(sys.argv[1]), name='x', overrides=[])\n"
        "log.log_metrics({'val/loss': 0.5}, step=7)\nprint('logged', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while "logged" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(3)  # W&B's process writes what it has once a second
        process.kill()
    (run,) = wandb_files.of_run(tmp_path)
    assert run.series("val/loss") == {7: 0.5}
    assert run.exit_code is None
    (path,) = (tmp_path / "wandb").glob("offline-*/run-*.wandb")
    path.write_bytes(path.read_bytes()[:-3])
    assert wandb_files.read(path).id == run.id


def test_a_key_in_the_environment(monkeypatch):
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()


@pytest.mark.parametrize(
    ("base_url", "host"),
    [
        (None, "api.wandb.ai"),
        ("https://wandb.example.com", "wandb.example.com"),
        ("http://localhost:8080/", "localhost:8080"),
    ],
)
def test_a_key_where_wandb_login_puts_it(monkeypatch, tmp_path, base_url, host):
    monkeypatch.delenv("WANDB_BASE_URL")
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    login(tmp_path / "home" / ".netrc", "elsewhere.org")
    assert not has_wandb_key()
    login(tmp_path / "home" / ".netrc", host)
    assert has_wandb_key()


def test_a_key_in_another_netrc(monkeypatch, tmp_path):
    login(tmp_path / "my" / "keys", "127.0.0.1:9")
    assert not has_wandb_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "my" / "keys"))
    assert has_wandb_key()


def test_a_broken_netrc_is_no_key(tmp_path):
    login(tmp_path / "home" / ".netrc", "a b c d")
    assert not has_wandb_key()
