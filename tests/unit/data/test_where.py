"""Conditions on the json of samples: data.where="width>=512 and clip>0.25"."""

import json
import logging
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import picture, tar_bytes
from synthetic_caches import write_synthetic_cache

from ldm.data.cached.datamodule import cached_data
from ldm.data.cached.manifest import CacheError
from ldm.data.datamodule import TextImageData
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.where import SampleFilter, count_missing
from ldm.utils.errors import UsageError

COLUMNS = {
    "width": np.array([512.0, 100.0, np.nan, 600.0]),
    "clip": np.array([0.3, 0.3, 0.2, np.nan]),
    "lang": np.array(["en", "de", "", "it's"]),
    "a.b c": np.array([1.0, 2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("width>=512 and clip>0.25", [0]),
        ('clip > .25 or lang == "it\'s"', [0, 1, 3]),
        ("100 < width <= 512", [0]),
        ("not width >= 512", [1, 2]),  # a comparison with a missing value is false
        ("not width >= 512 and has(width)", [1]),
        ("has(clip) and not has(lang)", [2]),
        ("lang in ['en', 'de']", [0, 1]),
        ("lang not in ('en',)", [1, 3]),
        ("lang != 'en'", [1, 3]),
        ("width != 512", [1, 3]),
        ("width in [100, 6e2]", [1, 3]),
        ('key("a.b c") * 100 - width > 0', [1]),
        ("-width / 2 + 300 >= 0 and has('a.b c')", [0, 1, 3]),
        ("width / 0 > 1 or 0 / 0 == 0", []),
        ('key("a.b c") >= true', [0, 1, 2, 3]),
    ],
)
def test_a_condition_selects_samples(text, kept):
    keep, left_out = SampleFilter(text).select(COLUMNS)
    assert np.flatnonzero(keep).tolist() == kept
    assert sum(left_out.values()) == len(keep) - len(kept)


def test_samples_are_counted_by_the_first_clause_that_leaves_them_out():
    condition = SampleFilter("width>=200 and (clip>0.25 or has(lang)) and lang == 'en'")
    assert condition.keys == ("width", "clip", "lang")
    counts = {"width>=200": 2, "lang == 'en'": 1}
    assert condition.select(COLUMNS)[1] == counts
    assert count_missing(COLUMNS) == {"width": 1, "clip": 1, "lang": 1}


HOSTILE = {
    "__import__('os').system('echo x')": "functions are not called",
    "has.__class__ == 1": 'a key with a dot is key("a.b")',
    "().__class__.__bases__[0] == 1": "odd characters",
    "width[0] > 1": "odd characters",
    "2 ** 99 ** 99 > width": "there are + - * and /",
    "10 ** width > 1": "there are + - * and /",
    "width << 99999999 > 1": "no value of the grammar",
    "width % 2 == 0": "no value of the grammar",
    "(" * 300 + "width" + ")" * 300 + " > 1": "too many nested parentheses at character 201",
    "-" * 1900 + "width > 1": "nested more than 40 deep",
    "not " * 300 + "width > 1": "nested more than 40 deep",
    "+".join(["width"] * 100) + " > 1": "nested more than 40 deep",
    "width > 1 " + "and width > 1 " * 200: "2810 characters",
    "ｗidth > 1": 'a key with such letters is written key("...")',
    "width\u00a0> 1": "invalid non-printable character",
    "width > 1\0": "null bytes",
    "width > '\ud800'": "cannot be read",
    "width > 1 # and clip > 0": "comment",
    "width > 1\nclip > 0": "one line",
    "lambda: width": "no condition",
    "(width := 1) > 0": "no value",
    "[width for width in [1]] == 1": "no value",
    "f'{width}' == 'a'": "no value",
    "width if clip else 1": "no condition",
    "await width": "no condition",
    "width > 1e999": "too large",
    "width > 1" + "0" * 400: "too large",
    "width > 1j": "no constant",
    "lang == b'en'": "no constant",
    "width > ...": "no constant",
    "width == None": "write has(KEY)",
    "lang == ''": "write has(KEY)",
    "width is 1": "write ==",
    "width > 1 & clip > 0": "write 'and'",
    "~(width > 1)": "write 'not'",
    "width": "a key alone is no condition",
    "not clip": "a key alone is no condition",
    "width > 1, clip > 0": "no condition",
    "width = 1": "invalid syntax",
    "width >= 512 adn clip > 0": "invalid syntax at character 14",
    "lang in lang": "a list such as",
    "width in []": "a list such as",
    "'a' in lang": "a list such as",
    "lang > 'a' + 'b'": "texts are not calculated with",
    "(width > 1) > 0": "no value",
    "has(width, clip)": "functions are not called",
    "has(width=1)": "functions are not called",
    "has(1)": "has() takes one key",
    "key(lang) > 1": "functions are not called",
    "1 < 2": "reads no key",
    "1 < 'a' and has(width)": "numbers are compared with texts",
    " ": "where is a condition",
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_what_is_not_in_the_grammar_is_refused_in_one_line(text, said):
    with pytest.raises(UsageError) as caught:
        SampleFilter(text)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@given(st.text(max_size=60))
def test_any_other_text_is_a_condition_or_refused(text):
    with suppress(UsageError):
        SampleFilter(text)


def test_the_kind_of_a_column_is_checked():
    for text in ("lang > 1", "width == 'en'", "lang + 1 > 2", "width in [1, 'en']"):
        with pytest.raises(UsageError, match="texts"):
            SampleFilter(text).select(COLUMNS)


NAMES = ("x", "y", "z")
numbers = st.integers(-9, 9) | st.sampled_from([0.5, -2.25, 1e3])
values = st.recursive(
    st.sampled_from(NAMES) | numbers.map(lambda n: f"({n})"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda t: f"({t[0]}{t[1]}{t[2]})"
    ),
    max_leaves=4,
)
comparisons = st.one_of(
    st.tuples(values, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), values).map(" ".join),
    st.tuples(values, values, values).map(lambda t: f"{t[0]} < {t[1]} <= {t[2]}"),
    st.tuples(values, st.sampled_from(["in", "not in"]), st.lists(numbers, min_size=1)).map(
        lambda t: f"{t[0]} {t[1]} {t[2]}"
    ),
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        inner.map(lambda c: f"not ({c})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda cs: f"({' and '.join(cs)})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda cs: f"({' or '.join(cs)})"),
    ),
    max_leaves=5,
)


@given(conditions, st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8))
def test_a_condition_means_what_python_says(text, rows):
    text = f"({text}) and (x < 1 or x >= 1)"  # reads a key
    columns = dict(zip(NAMES, np.array(rows, np.float64).T, strict=True))
    code = compile(text, "condition", "eval")
    said = [bool(eval(code, {}, dict(zip(NAMES, map(float, row), strict=True)))) for row in rows]
    assert SampleFilter(text).select(columns)[0].tolist() == said


FIELDS = [
    {"clip": 0.3, "lang": "en", "nsfw": False, "width": 1},
    {"clip": 0.1, "lang": "de", "nsfw": True},
    {"clip": "high", "lang": 5, "nsfw": None},
    {"clip": 0.4, "lang": "en", "caption": "x" * 300},
    {"clip": math.nan},
    {"clip": 10**400, "lang": "en"},
]


def write_shards(folder, rows=FIELDS):
    """Two shards of pictures of 8 x 6 pixels, the last of 6 x 8."""
    folder.mkdir(exist_ok=True)
    for shard in range(2):
        members = []
        for n, row in list(enumerate(rows))[shard::2]:
            size = (6, 8) if n == len(rows) - 1 else (8, 6)
            record = json.dumps({"caption": f"number {n}"} | row).encode()
            members += [(f"{n}.png", picture(n, size)), (f"{n}.json", record)]
        (folder / f"{shard}.tar").write_bytes(tar_bytes(members))
    return folder


def read_keys(folder, where, **options):
    index = open_index(folder, ReadOptions(where=where, **options))
    return [index.key(i) for i in range(len(index))]


def test_shards_are_read_where_the_json_meets_the_condition(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_shards(tmp_path / "a")
    assert read_keys(folder, None) == ["0", "2", "4", "1", "3", "5"]
    assert read_keys(folder, "clip>0.2") == ["0", "3"]
    assert (
        'where="clip>0.2" keeps 2 of 6 samples; left out: 4 by clip>0.2; 3 lack clip' in caplog.text
    )
    assert read_keys(folder, "lang == 'en'") == ["0", "3", "5"]  # 5 is no text: missing
    assert read_keys(folder, "nsfw == false") == ["0"]
    assert read_keys(folder, "width > height and aspect < 1.4 and has(lang)") == ["0", "1", "3"]
    assert read_keys(folder, "height == 8") == ["5"]
    assert read_keys(folder, "not has(clip)") == ["2", "4", "5"]


def test_a_condition_that_leaves_nothing_or_all_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_shards(tmp_path / "a")
    with pytest.raises(
        UsageError, match="keeps 0 of 6 samples; left out: 6 by clip>9; 3 lack clip"
    ):
        read_keys(folder, "clip>9")
    assert len(read_keys(folder, "width>1")) == 6
    assert "keeps 6 of 6 samples; left out: none" in caplog.text


def test_a_key_that_no_sample_has_is_refused_with_the_nearest(tmp_path):
    folder = write_shards(tmp_path / "a")
    for _ in range(2):  # also where there is an index
        with pytest.raises(UsageError, match="no json has the key clp - did you mean clip"):
            read_keys(folder, "clp>0.2")
        read_keys(folder, "clip>0.2")


def test_columns_are_saved_in_the_index_and_join_those_before(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "a")
    before = open_index(folder)
    assert read_keys(folder, "clip>0.2 and width>1") == ["0", "3"]
    assert read_keys(folder, "lang=='en'") == ["0", "3", "5"]
    with np.load(folder / "index.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
    assert meta["columns"] == ["clip", "lang"]
    monkeypatch.setattr("ldm.data.shards.index.scan_in_parallel", None)  # no shard is read again
    assert read_keys(folder, "clip>0.2 and lang=='en' and aspect>1") == ["0", "3"]
    after = open_index(folder)
    assert after.fingerprint == before.fingerprint
    assert after.sizes.tolist() == [[8, 6]] * 5 + [[6, 8]]
    index = open_index(folder, ReadOptions(where="clip>0.2"))
    assert index.columns["clip"].tolist() == [0.3, 0.4]
    assert index.fingerprint != before.fingerprint


def test_the_order_is_that_of_the_selected_samples_alone(tmp_path):
    """A filter equals shards that were written without the others."""
    rows = [{"clip": (n * 7 % 10) / 10, "n": n} for n in range(40)]
    write_shards(tmp_path / "all", rows)
    few = tmp_path / "few"
    few.mkdir()
    for shard in range(2):
        members = []
        for n, row in list(enumerate(rows))[shard::2]:
            if row["clip"] > 0.45:
                record = json.dumps({"caption": f"number {n}"} | row).encode()
                size = (6, 8) if n == 39 else (8, 6)
                members += [(f"{n}.png", picture(n, size)), (f"{n}.json", record)]
        (few / f"{shard}.tar").write_bytes(tar_bytes(members))
    how = {"size": 8, "batch_size": 4, "workers": 0, "seed": 3, "val": str(tmp_path / "all")}
    filtered = TextImageData(train=str(tmp_path / "all"), where="clip>0.45", **how)
    written = TextImageData(train=str(few), **how)
    assert 0 < len(filtered.train_set) == len(written.train_set) < 40
    places = [filtered.order.at(position)[1] for position in range(60)]
    assert places == [written.order.at(position)[1] for position in range(60)]
    for data in (filtered, written):
        data.keys = [data.train_set[i, p]["key"] for p, i in enumerate(places)]
    assert filtered.keys == written.keys
    assert len(filtered.val_set) == 40, "validation stays as it is"
    assert len(TextImageData(train=str(few), val_where="n<10", **how).val_set) == 10


def test_a_cache_is_filtered_like_its_source(tmp_path):
    """By what it kept of the json; sizes of images were another thing when it was made."""
    write_synthetic_cache(tmp_path / "c")
    places = {"train": str(tmp_path / "c"), "val": str(tmp_path / "c")}
    how = {**places, "batch_size": 2, "workers": 0}
    data = cached_data(**how, where="note < 9 and note != 3", val_where="note >= 9")
    assert (len(data.train_set), len(data.val_set)) == (8, 3)
    batch = data.train_set.read_batch([(3, 0), (7, 1)])
    assert data.train_set.unpack(batch)["key"] == ["0004", "0008"]
    with pytest.raises(
        CacheError, match=r"data\.val_where: a cache has the aspect of .* ldm cache where="
    ):
        cached_data(**how, val_where="note > 1 or aspect > 1")
