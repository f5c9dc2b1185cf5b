"""The pictures of an introduction show what the model does, and the verb makes them all."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from world import SIZE, pipeline

from ldm.cli.explain import find_newest_run, main
from ldm.cli.explain_figures import (
    BASE_SCENE,
    GUIDANCE_SCALES,
    PROCESS_COLUMNS,
    SCENE_CHANGES,
    SCENE_VOCABULARY,
    RecordingGuidance,
    SamplingSettings,
    SharedNoiseTextToImage,
    _change_scene,
    _compute_word_directions,
    decode_to_cpu,
    plot_clip_space,
    plot_forward_process,
    plot_guidance_scales,
    plot_noise_injection,
    plot_reverse_process,
    render_scene,
    select_evenly,
)
from ldm.config.components import (
    FROZEN_GROUPS,
    build_all_schedules,
    build_denoiser,
    build_frozen_encoders,
)
from ldm.config.composition import CONF_DIR
from ldm.data.scenes.draw import draw_scene
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.inference.pipeline import Pipeline
from ldm.utils.checkpoint_file import link_last_checkpoint, write_checkpoint
from ldm.utils.hashing import hash_module
from ldm.utils.images import from_uint8, to_pil
from ldm.utils.plots import FIGURE_IMAGE_SIZE, MARGIN, ImageRow, draw_image_grid, resize_longer_side

AT = SamplingSettings(seed=3, size=SIZE, steps=12)
PROMPT = "a red circle"
STRANGE = "$x_{ 100% \\frac $$ 🦊 \ud83d ${oops} " + 40 * "long "
PICTURES = ["clip.png", "forward.png", "guidance.png", "noise.png", "reverse.png"]


def painted(pipe: Pipeline, seeds=(3,), **parts) -> torch.Tensor:
    components = {name: parts.pop(name) for name in ("task",) if name in parts}
    pipe = replace(pipe.replace_components(**components), **parts)
    return pipe([PROMPT] * len(seeds), seeds=seeds, size=SIZE, steps=AT.steps)


def places(page: Image.Image, picture: Image.Image) -> list[tuple[int, int]]:
    """Where on the page the picture stands, pixel for pixel: (x, y)."""
    page, picture = np.asarray(page), np.asarray(picture)
    height, width, _ = picture.shape
    corners = (page[: -height + 1, : -width + 1] == picture[0, 0]).all(-1)
    corners &= (page[height - 1 :, width - 1 :] == picture[-1, -1]).all(-1)
    return [
        (int(x), int(y))
        for y, x in np.argwhere(corners)
        if (page[y : y + height, x : x + width] == picture).all()
    ]


def steps():
    seen = []
    return seen, lambda i, x0_hat: seen.append(i)


def test_pixels_stay_as_they_are():
    image = torch.rand(3, 16, 16) * 2 - 1
    picture = resize_longer_side(image)
    assert picture.size == (FIGURE_IMAGE_SIZE, FIGURE_IMAGE_SIZE)
    assert picture.getpixel((8 * 8 - 1, 3)) == to_pil(image).getpixel((7, 0))
    assert places(draw_image_grid("", "", [ImageRow("", [image])]), picture)[0][0] == MARGIN
    assert resize_longer_side(torch.zeros(3, 200, 300)).size == (FIGURE_IMAGE_SIZE, 85)


def test_the_forward_process_begins_with_the_picture_and_ends_in_noise():
    image, _ = render_scene(0, 64)
    schedules = build_all_schedules()
    assert {"linear", "scaled_linear", "cosine", "flow"} <= set(schedules)
    page = plot_forward_process(image, schedules, seed=5)
    assert [x for x, _ in places(page, resize_longer_side(image))] == [MARGIN] * len(schedules)
    flow = plot_forward_process(image, {"flow": schedules["flow"]}, seed=5)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))[0]
    assert len(places(flow, resize_longer_side(noise))) == 1, "flow ends in the noise itself"
    half = len(places(flow, resize_longer_side((image + noise) / 2)))
    assert half == 1, "and is half noise in the middle"


def test_watching_changes_nothing(tiny_text):
    pipe = pipeline(tiny_text, eta=1.0)
    watched = RecordingGuidance(pipe.guidance)
    images = painted(pipe, guidance=watched)
    assert torch.equal(images, painted(pipe))
    times = [moment.t for moment in watched.moments]
    assert len(times) == AT.steps
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert torch.equal(decode_to_cpu(pipe, watched.moments[-1].x0_hat), images)
    shown_times = [moment.t for moment in select_evenly(watched.moments)]
    assert len(shown_times) == PROCESS_COLUMNS
    assert (shown_times[0], shown_times[-1]) == (times[0], times[-1])
    assert len(select_evenly(watched.moments[:4])) == 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_reverse_process_ends_in_the_picture(tiny_text, dtype):
    pipe, (seen, on_step) = replace(pipeline(tiny_text), dtype=dtype), steps()
    page = plot_reverse_process(pipe, PROMPT, AT, on_step=on_step)
    assert len(seen) == AT.steps
    assert len(places(page, resize_longer_side(painted(pipe)[0]))) == 1


def test_from_one_start_only_added_noise_leads_elsewhere(tiny_text):
    pipe = pipeline(tiny_text)
    start = SharedNoiseTextToImage()
    same = painted(pipe, [3, 4], task=start)
    torch.testing.assert_close(same[0], painted(pipe)[0], atol=1e-5, rtol=0)
    assert torch.equal(same[0], same[1])
    first, second = painted(pipe, [3, 4], task=start, sampler=DDIMSampler(eta=1.0))
    assert (first - second).abs().max() > 1e-2
    page = plot_noise_injection(pipe, PROMPT, AT, on_step=steps()[1])
    assert len(places(page, resize_longer_side(same[0]))) == 2, "both rows without noise"
    assert (
        len(places(page, resize_longer_side(first)))
        == len(places(page, resize_longer_side(second)))
        == 1
    )


def test_guidance_goes_over_all_scales(tiny_text):
    pipe, (seen, on_step) = pipeline(tiny_text), steps()
    page = plot_guidance_scales(pipe, [PROMPT, "a blue square"], AT, on_step=on_step)
    assert len(seen) == AT.steps * len(GUIDANCE_SCALES)
    columns = []
    for scale in (0, 3, 10):
        images = painted(pipe, [3, 3], guidance=ClassifierFreeGuidance(scale=scale))
        columns += [x for x, _ in places(page, resize_longer_side(images[0]))]
    lefts = [MARGIN + i * (FIGURE_IMAGE_SIZE + 8) for i in (0, 3, 6)]
    assert columns == [lefts[0]] * 2 + lefts[1:], "without the prompt, both rows are alike"


def test_a_clip_is_drawn(tiny_clip):
    page = plot_clip_space(tiny_clip)
    base = from_uint8(draw_scene(BASE_SCENE, SIZE, np.random.default_rng(0)))
    assert len(places(page, resize_longer_side(base))) == len(SCENE_CHANGES)
    assert render_scene(2, SIZE)[1] == render_scene(2, 64)[1]


def test_a_pair_differs_in_one_thing_and_has_its_word(tiny_clip):
    words = _compute_word_directions(tiny_clip)
    assert not {"red", "circle", "large", "black", "flat"} & set(words), "they change nothing"
    for name, value in SCENE_CHANGES.items():
        assert value in words
        assert value in SCENE_VOCABULARY[name]
        changed = _change_scene(name, value)
        assert changed.split() != "unseen"
        both = [
            from_uint8(draw_scene(s, 64, np.random.default_rng(0))) for s in (BASE_SCENE, changed)
        ]
        share = (both[0] != both[1]).any(0).float().mean()
        assert 0.02 < share < (1 if name == "background" else 0.3)


def test_any_text_is_set(tiny_text):
    page = draw_image_grid(
        "a title", STRANGE, [ImageRow(STRANGE, [torch.zeros(3, 8, 8)], [STRANGE[:5]])]
    )
    assert page.width == 760 + 2 * MARGIN
    plot_reverse_process(pipeline(tiny_text), STRANGE, AT, on_step=steps()[1])


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Path:
    """A folder with a run of a small model in pixel space, as train.py leaves it."""
    home = tmp_path_factory.mktemp("home")
    tiny_clip.save(home / "clip")
    net = ["channels=16", "multipliers=[1]", "blocks=1", "attention=[true]", "heads=2"]
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose(
            "train",
            [
                *("name=first", f"data.size={SIZE}", "autoencoder=identity", "model=nano"),
                *("text_encoder=clip", f"text_encoder.path={home / 'clip'}"),
                *(f"model.{one}" for one in net),
            ],
        )
    OmegaConf.resolve(cfg)
    frozen = build_frozen_encoders(cfg)
    network = build_denoiser(cfg, *frozen, None, TextToImage())
    payload = {
        "state_dict": {f"ema.module.{k}": v for k, v in network.state_dict().items()},
        "global_step": 7,
        "ldm": {
            "stage": "diffusion",
            "config": OmegaConf.to_yaml(cfg),
            "frozen": dict(zip(FROZEN_GROUPS, map(hash_module, frozen), strict=True)),
        },
    }
    run = home / "runs" / "first"
    write_checkpoint(payload, run / "checkpoints" / "step=00000007.ckpt")
    link_last_checkpoint(run / "checkpoints" / "step=00000007.ckpt")
    OmegaConf.save(cfg, run / "config.yaml")
    (run / "result.json").write_text('{"status": "finished"}')
    return home


@pytest.fixture
def call(home, monkeypatch, capsys):
    """The verb with some arguments in `home`: what it prints, and its exit code."""

    def call(*arguments, cwd=home):
        monkeypatch.chdir(cwd)
        command = ["explain", "device=cpu", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_verb_draws_the_newest_run(call, home):
    code, out, err = call("out=pictures", "steps=3", f"prompt={PROMPT}", "sampler=ddpm")
    assert code == 0, out + err
    assert "ckpt=runs/first, the newest finished run" in out
    assert out.splitlines()[-1] == "pictures"
    assert sorted(path.name for path in (home / "pictures").iterdir()) == PICTURES
    for name in PICTURES:
        facts = Image.open(home / "pictures" / name).text
        assert facts["ckpt"].endswith("runs/first/checkpoints/step=00000007.ckpt")
    facts = Image.open(home / "pictures" / "noise.png").text
    assert (json.loads(facts["prompt"]), facts["steps"], facts["step"]) == ([PROMPT], "3", "7")


def test_a_text_encoder_without_images_costs_one_picture(call, home, tiny_text):
    whole, half = home / "clip", home / "half"
    tiny_text.model.save_pretrained(half)
    shutil.copy(whole / "tokenizer.json", half)
    shutil.copy(whole / "tokenizer_config.json", half)
    (home / "prompts.txt").write_text(f"{PROMPT}\n\na blue square\n")
    Image.new("RGB", (40, 30), "teal").save(home / "a.png")
    options = ["prompts=prompts.txt", "image=a.png", "steps=2", f"text_encoder={half}"]
    code, out, err = call("ckpt=runs/first", "out=no clip", *options)
    assert code == 0, out + err
    assert "no clip.png: the text encoder is no CLIP with an image half" in out
    assert sorted(path.name for path in (home / "no clip").iterdir()) == PICTURES[1:]
    teal = torch.tensor([0, 128, 128])[:, None, None] / 127.5 - 1
    page = Image.open(home / "no clip" / "forward.png")
    assert places(page, resize_longer_side(teal.expand(3, SIZE, SIZE)))


def test_mistakes_are_told_plainly(call, tmp_path):
    code, _, err = call(cwd=tmp_path)
    assert code == 2
    assert "no finished text-to-image run under runs/" in err
    assert "train.py data=scenes" in err
    assert "runs/first" in call("ckpt=runs/fisrt")[2]
    assert "did you mean steps?" in call("step=3")[2]


def test_the_newest_finished_diffusion_run_is_taken(tmp_path):
    made = {"a": "diffusion", "sweep/b": "diffusion", "c": "clip", "d": "diffusion", "e": None}
    for name, stage in made.items():
        (tmp_path / name).mkdir(parents=True)
        status = "failed" if name == "d" else "finished"
        (tmp_path / name / "result.json").write_text(json.dumps({"status": status}))
        if stage:
            (tmp_path / name / "config.yaml").write_text(f"stage: {stage}\n")
    other = "stage: diffusion\ntask: {_target_: ldm.diffusion.tasks.inpainting.Inpainting}\n"
    (tmp_path / "e/config.yaml").write_text(other)
    assert find_newest_run(tmp_path) == tmp_path / "sweep/b"
