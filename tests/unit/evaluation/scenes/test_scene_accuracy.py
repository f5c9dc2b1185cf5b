"""Scene accuracy of painters that are known to be perfect, or wrong in one way."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.world import UNSEEN_PAIRS
from ldm.evaluation.scenes.accuracy import METRIC_SUFFIXES, SCENE_METRICS, ScenePromptAccuracy

COUNT = 24


@pytest.fixture(scope="module")
def scenes():
    return ScenePromptAccuracy(count=COUNT, batch=10)


def painter(scenes, change=lambda scene: scene):
    """It looks up the scene that a prompt tells of, and draws it, changed."""
    told = dict(zip(scenes.prompts, scenes.scenes, strict=True))

    def paint(prompts, *, seeds):
        rngs = [np.random.default_rng(seed) for seed in seeds]
        pictures = [
            draw_scene(change(told[prompt]), 64, rng)
            for prompt, rng in zip(prompts, rngs, strict=True)
        ]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1

    return paint


def everything(scenes):
    return range(len(scenes))


def swapped_colours(scene):
    first, second = scene.objects
    objects = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return replace(scene, objects=objects)


def test_a_perfect_painter_is_right_and_others_captions_are_met_by_chance(scenes):
    metrics = scenes.metrics(scenes.tally(painter(scenes), everything(scenes)))
    assert set(metrics) == {
        f"scene_{name}{suffix}" for name in SCENE_METRICS for suffix in METRIC_SUFFIXES
    }
    for name in SCENE_METRICS:
        assert metrics[f"scene_{name}"] == metrics[f"scene_{name}_unseen"] == 1.0
    assert metrics["scene_accuracy_chance"] == 0
    # One in five and one in four; COUNT scenes a split leave a standard error of some 0.03.
    assert metrics["scene_background_chance"] == pytest.approx(1 / 5, abs=0.1)
    assert metrics["scene_style_chance"] == pytest.approx(1 / 4, abs=0.1)
    assert 0.25 < metrics["scene_relation_chance"] < 0.75  # two axes, and pairs may be turned
    assert metrics["scene_color_chance"] < 0.1  # one in 28, nearly


def test_swapped_colours_lose_the_colours_and_the_whole(scenes):
    wrong = painter(scenes, swapped_colours)
    metrics = scenes.metrics(scenes.tally(wrong, everything(scenes)))
    for suffix in ("", "_unseen"):
        lost = {name for name in SCENE_METRICS if metrics[f"scene_{name}{suffix}"] < 1}
        assert lost == {"accuracy", "color"}
        assert metrics[f"scene_accuracy{suffix}"] == metrics[f"scene_color{suffix}"] == 0


def test_seen_and_unseen_are_told_apart(scenes):
    def only_seen(prompts, *, seeds):
        images = painter(scenes)(prompts, seeds=seeds)
        known = [scenes.prompts.index(prompt) < COUNT for prompt in prompts]
        return torch.where(torch.tensor(known)[:, None, None, None], images, -1.0)

    metrics = scenes.metrics(scenes.tally(only_seen, everything(scenes)))
    assert metrics["scene_accuracy"] == 1
    assert metrics["scene_accuracy_unseen"] == metrics["scene_color_unseen"] == 0


def test_prompts_are_fixed_and_split():
    few, more = ScenePromptAccuracy(count=3), ScenePromptAccuracy(count=5, seed=7)
    assert few.prompts == more.prompts[:3] + more.prompts[5:8]
    assert few.prompts[0] == (
        "on a brown background, a large purple circle left of a little blue star, both rimmed"
    )
    assert (few.seeds, more.seeds) == ([0, 1, 2] * 2, [7, 8, 9, 10, 11] * 2)
    for scene in more.scenes[:5]:
        assert scene.split() == "val"
    for scene in more.scenes[5:]:
        assert any((one.colour, one.shape) in UNSEEN_PAIRS for one in scene.objects)


@pytest.mark.parametrize("world", [1, 3, 5])
def test_shares_of_any_number_of_ranks_add_up(scenes, world):
    def scribble(prompts, *, seeds):
        """Right for one prompt in three, so that the counts have something to say."""
        images = painter(scenes)(prompts, seeds=seeds)
        keep = torch.tensor([scenes.prompts.index(prompt) % 3 == 0 for prompt in prompts])
        return torch.where(keep[:, None, None, None], images, images.flip(2))

    whole = scenes.tally(scribble, everything(scenes))
    parts = [scenes.tally(scribble, everything(scenes)[rank::world]) for rank in range(world)]
    assert np.array_equal(sum(parts), whole)
    assert 0 < whole[0, 0] < COUNT


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="count=2"):
        ScenePromptAccuracy(count=1)
    with pytest.raises(ValueError, match="batch=1"):
        ScenePromptAccuracy(count=2, batch=0)
