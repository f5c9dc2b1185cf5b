"""python -m ldm.clip: what a CLIP says of pictures and words.

Shapes: n queries, m items.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from shell import run
from torch.nn import functional as F

from ldm.cli.clip import CLIP_TEXT_OPTIONS, answer_query, choose_query, read_option_list
from ldm.config import command_line
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.prepare import prepare_scenes
from ldm.data.scenes.world import BACKGROUNDS, Scene, SceneObject
from ldm.evaluation.clip_queries import ClipQueries
from ldm.evaluation.metrics.clip_directions import find_captions_with_word, find_common_words
from ldm.evaluation.metrics.retrieval import compute_retrieval_ranks
from ldm.utils.errors import UsageError

COUNT = 12
SCENE = Scene(
    (SceneObject("circle", "red", "large"), SceneObject("cross", "yellow", "large")),
    relation="left of",
    background="black",
    style="flat",
)


def paint(scene: Scene, path: Path) -> Path:
    Image.fromarray(draw_scene(scene, 64, np.random.default_rng(0))).save(path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Twelve scenes in shards, and two pictures that differ in their background."""
    home = tmp_path_factory.mktemp("clip")
    prepare_scenes(out=str(home / "shards"), count=COUNT, split="val", workers=1)
    (home / "few").mkdir()
    paint(replace(SCENE, background="teal"), home / "few" / "teal.png")
    paint(SCENE, home / "black.png")
    return home


@pytest.fixture(scope="module")
def about(home) -> ClipQueries:
    return ClipQueries(data=str(home / "shards"), cache=home / "cache")


def ask(*words, home, expect=0):
    return run("-m", "ldm.clip", *words, cwd=home, expect=expect)


@pytest.mark.slow
def test_the_command_line_finds_words(home):
    said = ask("image=few", "minus=black.png", "top=2", home=home)
    assert re.search(r"^cosine +word\n0\.\d+ +teal\n", said, re.M)


def test_the_command_line_finds_pictures(home):
    key = "000000004"
    caption = ClipQueries(data=str(home / "shards")).dataset.shards.read(4).captions[0]
    said = ask("data=shards", f"text={caption}", "top=3", "out=page.png", home=home)
    rows = said.strip().splitlines()
    assert rows[1].split(maxsplit=2)[1:] == [key, caption]
    assert rows[-1] == "page.png"
    page = Image.open(home / "page.png")
    found = json.loads(page.text["found"])
    assert [one["key"] for one in found] == [row.split()[1] for row in rows[1:4]]
    assert page.width == 3 * 192 + 2 * 12
    assert list((home / "data" / "cache" / "clip").glob("real-clip-*.safetensors"))


def test_similarity_is_clips_own_cosine(about, home):
    texts = ["a red circle", "a large red circle left of a large yellow cross, flat, on black"]
    found = about.compute_similarity([home / "black.png"], texts)
    pixels = torch.from_numpy(np.array(Image.open(home / "black.png"))).permute(2, 0, 1)[None]
    model = about.clip.clip
    with torch.no_grad():
        expected = model.encode_images(pixels / 127.5 - 1) @ model.encode_texts(texts).T
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert found[0, 1] > found[0, 0]
    with pytest.raises(ValueError, match=r"reads 24 tokens, and a text has \d+: shorten 'red red"):
        about.compute_similarity([home / "black.png"], ["red " * 50])


def test_what_was_seen_is_kept_in_the_order_of_the_set(about, monkeypatch):
    vectors, (texts, pairs) = about.embed_images(), about.caption_pairs
    captions = about.embed_captions(texts)
    shards = about.dataset.shards
    own = torch.stack([about.dataset[i, i]["images"] for i in range(COUNT)])
    torch.testing.assert_close(vectors, F.normalize(about.clip(own), dim=1), atol=1e-5, rtol=0)
    assert {(int(i), texts[j]) for i, j in pairs.tolist()} == {
        (i, text) for i in range(COUNT) for text in shards.read(i).captions
    }
    monkeypatch.setattr(about.clip, "_compute_features", None)  # nothing is seen anew
    monkeypatch.setattr(about.clip, "encode_texts", None)
    assert torch.equal(about.embed_images(), vectors)
    assert torch.equal(about.embed_captions(texts), captions)


def test_recall_counts_who_is_nearer_than_ones_own():
    queries, items = F.normalize(torch.randn(600, 8), dim=1), F.normalize(torch.randn(50, 8), dim=1)
    pairs = torch.stack([torch.arange(600).repeat(2), torch.randint(50, (1200,))], dim=1)
    found = compute_retrieval_ranks(queries, items, pairs)
    for i in range(0, 600, 37):
        own = pairs[pairs[:, 0] == i, 1]
        cosines = queries[i] @ items.T
        assert found[i] == sum(cosine > cosines[own].max() for cosine in cosines)


def test_scenes_find_their_captions(about):
    for shares in about.compute_recall().values():
        assert shares[0] > 0.9
        assert shares[-1] == 1


def test_labels_are_probabilities_read_in_sentences(about, home):
    names = list(BACKGROUNDS)
    paths = [home / "few" / "teal.png", home / "black.png"]
    packaged = ClipQueries(cache=home / "cache")
    found = packaged.classify_labels(paths, names)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert [names[i] for i in found.argmax(1)] == ["teal", "black"]
    plain = ClipQueries(templates=["a picture of a {}"], cache=home / "cache")
    said = plain.embed_texts([f"a picture of a {name}" for name in names])
    scale = plain.clip.clip.logit_scale
    torch.testing.assert_close(
        plain.classify_labels(paths, names), (scale * plain.embed_files(paths) @ said.T).softmax(1)
    )
    with pytest.raises(ValueError, match="no caption holds 'gold'"):
        about.classify_labels(paths, ["gold"])


def test_the_same_picture_has_no_word(about, home):
    with pytest.raises(ValueError, match=r"black.png' are the same to this CLIP: no word differs"):
        about.find_difference(home / "black.png", home / "black.png", ["red"], most=3)


def test_what_is_broken_in_a_folder_is_left_out_and_named(home, tmp_path, capsys):
    paint(SCENE, tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with initialize_config_dir(command_line.CONF_DIR, version_base="1.3"):
        cfg = compose("clip", overrides=[f"cache={home}/cache"])
    asked = {name: cfg[name] for name in CLIP_TEXT_OPTIONS} | {
        "image": [str(tmp_path)],
        "text": ["x"],
    }
    said = answer_query(cfg, asked, "similarity")
    assert "a.png" in said
    assert "torn.png" not in said
    assert "torn.png': damaged PNG" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.png': no JPEG"):
        answer_query(cfg, asked, "similarity")


CHANGES = {
    "green": replace(SCENE, objects=(replace(SCENE.objects[0], colour="green"), SCENE.objects[1])),
    "square": replace(SCENE, objects=(replace(SCENE.objects[0], shape="square"), SCENE.objects[1])),
    "brown": replace(SCENE, background="brown"),
    "striped": replace(SCENE, style="striped"),
}


@pytest.mark.parametrize("word", CHANGES)
def test_the_word_of_a_difference_is_near_and_that_of_its_opposite_far(word, home, tmp_path):
    packaged, path = ClipQueries(cache=home / "cache"), paint(CHANGES[word], tmp_path / "a.png")
    there = packaged.find_difference(path, home / "black.png", None, most=300)
    words = [name for name, _ in there]
    assert words.index(word) < 5
    assert not {"a", "on"} & set(words), "all captions have them"
    back = dict(packaged.find_difference(home / "black.png", path, None, most=300))
    assert all(back[name] == pytest.approx(-cosine, abs=1e-5) for name, cosine in there)


def test_words_in_templates_are_taken_apart(home):
    plain = ClipQueries(templates=["a {}", "one {} thing"], cache=home / "cache")
    words = plain.embed_words(["red", "blue"], subtract_mean=True)
    torch.testing.assert_close(words.directions[0], -words.directions[1])
    rows = plain.embed_texts(["a red", "one red thing", "a blue", "one blue thing"])
    expected = (rows[0] + rows[1] - rows[2] - rows[3]) / 4
    torch.testing.assert_close(words.directions[0], expected)


def test_vocabulary_is_the_commonest_words_that_set_captions_apart():
    captions = ["a red cat", "A red dog", "a blue dog's left-over", "a red-hot dog"]
    words = find_common_words([*captions * 5, "a bird"], 3)
    assert words == ["dog", "red", "blue"]
    assert "bird" not in find_common_words([*captions * 5, "a bird"], 99)
    assert find_captions_with_word(captions, "red") == [0, 1, 3]
    assert find_captions_with_word(captions, "a red") == [0, 3], "phrases may be asked for"


QUESTIONS = {
    "similarity": {"image", "texts"},
    "search": {"data", "text", "clip"},
    "recall": {"data"},
    "label": {"image", "labels", "template"},
    "difference": {"image", "minus", "data"},
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_what_is_given_is_the_question(kind):
    assert choose_query(QUESTIONS[kind]) == kind
    stray = "labels" if kind == "difference" else "words"
    with pytest.raises(UsageError, match=rf"{stray}=\.\. has no part in this: {kind} takes"):
        choose_query(QUESTIONS[kind] | {stray})


def test_no_question_is_told_what_to_give():
    for given in ({"image"}, {"text"}, set(), {"minus"}, {"labels"}):
        with pytest.raises(UsageError, match="data=DIR alone for recall"):
            choose_query(given)


def test_lists_come_from_commas_or_a_file(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("a cat\n\n a dog \na cat\n")
    assert read_option_list("labels", str(file)) == ["a cat", "a dog"]
    assert read_option_list("labels", "[a cat, a dog]") == ["a cat", "a dog"]
    file.write_text("\n")
    for wrong in (str(file), ", ,"):
        with pytest.raises(UsageError, match=r"labels=.* names nothing"):
            read_option_list("labels", wrong)


def test_mistakes_are_told_before_torch_is_imported(home):
    code = (
        "import sys, runpy\n"
        "for words in map(str.split, sys.argv[1:]):\n"
        "    sys.argv = ['clip', *words]\n"
        "    try: runpy.run_module('ldm.clip', run_name='__main__')\n"
        "    except SystemExit as error: print(error.code)\n"
        "print('torch' in sys.modules)\n"
    )
    wrong = {
        "image=no.png text=x": "image=no.png does not exist",
        "image=shards text=x": "image=shards is a folder without images",
        "image=black.png labels=,": "labels=, names nothing",
        "image=black.png labels=no.txt": "labels=no.txt: No such file",
        "image=black.png texts=no.txt": "texts=no.txt: No such file",
        "image=few image=black.png minus=black.png": "are one image each",
        "data=shards text=a text=b": "a search is for one text or one image",
        "image=black.png labels=a template=no.txt": "template=no.txt: No such file",
        "data=shards text=a top=0": "top=0 must be a whole number from 1",
        "data=shards txt=a": "did you mean text?",
    }
    said = run("-c", code, *wrong, cwd=home)
    for told in wrong.values():
        assert told in said
    assert said.splitlines()[-1] == "False", "torch was imported"
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_of_ones_own_is_asked(prepared, tmp_path):
    words = ["clip=runs/clip", "data=shards", f"cache={tmp_path}"]
    said = ask(*words, home=prepared)
    assert re.search(r"^([01]\.\d{3} +){3}image to caption, of 16$", said, re.M)


@pytest.mark.slow
def test_mistakes_in_files_are_told_in_a_line(home):
    (home / "torn.png").write_bytes((home / "black.png").read_bytes()[:200])
    assert "'torn.png': damaged PNG" in ask("image=torn.png", "text=x", home=home, expect=2)
    said = ask("clip=runs/none", "image=black.png", "text=x", home=home, expect=2)
    assert "no CLIP model at 'runs/none'" in said
    assert "Traceback" not in said
