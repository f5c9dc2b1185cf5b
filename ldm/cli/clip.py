"""python -m ldm.clip image=a.png text="a red star" | data=DIR text=.. | ..; --help has them all."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.sample_options import check_places
from ldm.data.prepare.sources import SUFFIXES, pictures_in
from ldm.utils.errors import UsageError
from ldm.utils.files import located, read_text, reserve
from ldm.utils.output_path import place
from ldm.utils.text import printable, prose

MANY = ("image", "text")  # may be given several times
TEXTS = ("clip", *MANY, "minus", "texts", "data", "labels", "words", "template", "out")
# What each question needs, and what it may be given beside.
TAKES = {
    "difference": (["image", "minus"], ["words", "template", "data"]),
    "label": (["image", "labels"], ["template", "data"]),
    "search": (["data"], ["image", "text", "out"]),
    "recall": (["data"], []),
    "similarity": (["image", "text"], []),
}


def main() -> None:
    """Compose, ask, print."""
    many = {name: typed(name) for name in MANY}
    texts = command_line.take_text(TEXTS)

    @hydra.main(config_path=command_line.CONF, config_name="clip", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        kind = question({name for name, value in texts.items() if value})
        with command_line.told_plainly():
            print(answer(cfg, {name: cfg[name] for name in TEXTS} | texts | many, kind))

    command_line.run(composed, "clip")


def typed(name: str) -> list[str]:
    """All values that the command line gives a name, as `cli.take_text` has them."""
    words = [word.partition("=") for word in sys.argv[1:]]
    values = [value for key, _, value in words if key == name and value]
    return [
        prose(value) if name in command_line.PROSE else os.path.expanduser(value)
        for value in values
    ]


def question(given: set[str]) -> str:
    """What is asked, by the names of what is given; UsageError where that is no question."""
    given = {"text" if name == "texts" else name for name in given} - {"clip"}
    if "minus" in given:
        kind = "difference"
    elif "labels" in given:
        kind = "label"
    elif "data" in given:
        kind = "search" if given & {"image", "text"} else "recall"
    else:
        kind = "similarity"
    needed, more = TAKES[kind]
    if not set(needed) <= given:
        raise UsageError(
            "give image=.. and text=.. (or texts=FILE) for their similarity; data=DIR and one of "
            "them for a search; data=DIR alone for recall; image=.. and labels=a,b,c for "
            "probabilities; image=.. and minus=.. for the words that differ"
        )
    if stray := sorted(given - {*needed, *more}):
        raise UsageError(
            f"{stray[0]}=.. has no part in this: {kind} takes {', '.join([*needed, *more])}"
        )
    return kind


def answer(cfg: DictConfig, asked: dict, kind: str) -> str:
    """The lines to print; a search leaves a picture as well.

    Raises UsageError for what cannot be asked, OSError and ValueError where files are not what they
    should be.
    """
    paths = [path for name in asked["image"] or () for path in pictures("image", name)]
    others = pictures("minus", asked["minus"]) if kind == "difference" else []
    texts = [*(asked["text"] or ()), *(lines("texts", asked["texts"]) if asked["texts"] else ())]
    words = listed("words", asked["words"]) if asked["words"] else None
    labels = listed("labels", asked["labels"]) if kind == "label" else []
    templates = [asked["template"] or ""]
    if "{}" not in templates[0]:
        templates = lines("template", asked["template"]) if asked["template"] else []
    if any("{}" not in template for template in templates):
        raise UsageError(f"template={asked['template']} has a line without {{}} for the word")
    if kind == "difference" and len(paths) + len(others) > 2:
        raise UsageError("image=.. and minus=.. are one picture each, and no folders")
    if kind == "search" and len(paths) + len(texts) > 1:
        raise UsageError("a search is for one text or one picture: give one of them")

    check_places(cfg)
    wanted = place(asked["out"], Path("retrieved.png"), moving=False)
    from ldm.evaluation.clip_queries import AT, Answers  # with torch and transformers: seconds
    from ldm.utils.images import save_png

    how = {"cache": located(cfg.cache), "batch": cfg.batch, "device": cfg.device}
    clip = Answers(asked["clip"], data=asked["data"], templates=templates, **how)
    if len(paths) > 1:  # a folder may hold what is none
        paths = clip.readable(paths) or paths[:1]
    if kind == "similarity":
        rows = ranked(paths, texts, clip.similarity(paths, texts).tolist())
        rows = [[f"{v:.3f}", f"{100 * max(v, 0):.1f}", *rest] for v, *rest in rows]
        return table(["cosine", "CLIP score", "picture", "text"], rows)
    if kind == "label":
        rows = ranked(paths, labels, clip.labels(paths, labels).tolist())
        return table(["share", "picture", "label"], [[f"{v:.3f}", *rest] for v, *rest in rows])
    if kind == "difference":
        found = clip.difference(paths[0], others[0], words, most=cfg.most)
        return table(["cosine", "word"], [[f"{v:.3f}", word] for word, v in found[: cfg.top]])
    if kind == "recall":
        rows = [[*(f"{v:.3f}" for v in shares), way] for way, shares in clip.recall().items()]
        return table([*(f"at {k}" for k in AT), "from"], rows)
    found, page = clip.search([*paths, *texts][0], top=cfg.top)
    facts = {"clip": asked["clip"], "data": asked["data"], "found": found}
    with reserve(lambda n: [wanted.with_stem(wanted.stem + n)], overwrite=cfg.overwrite) as [out]:
        save_png(page, out, facts)
    rows = [[f"{one['cosine']:.3f}", one["key"], one["caption"]] for one in found]
    return f"{table(['cosine', 'key', 'caption'], rows)}\n{out}"


def ranked(paths: list[Path], texts: list[str], values: list[list[float]]) -> list[tuple]:
    """Value, picture and text of each pair, a picture's largest value first."""
    found = []
    for path, row in zip(paths, values, strict=True):
        pairs = sorted(zip(row, texts, strict=True), key=lambda pair: -pair[0])
        found += [(value, str(path), text) for value, text in pairs]
    return found


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns of words, all but the last of one width."""
    lines = [[printable(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    padded = ([*map(str.ljust, line[:-1], widths), line[-1]] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def pictures(name: str, place: str) -> list[Path]:
    """A picture's path, or those in a folder, in order of name; UsageError where there is none."""
    path = Path(place)
    if not path.exists():
        raise UsageError(f"{name}={place} does not exist")
    if not path.is_dir():
        return [path]
    found = pictures_in(path)
    if not found:
        raise UsageError(f"{name}={place} is a folder without pictures ({', '.join(SUFFIXES)})")
    return found


def lines(name: str, place: str) -> list[str]:
    """The lines with text of a file; UsageError where there are none."""
    try:
        text = read_text(place)
    except OSError as error:
        raise UsageError(f"{name}={place}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{name}={error}") from error
    return some(name, place, text.splitlines())


def listed(name: str, typed: str) -> list[str]:
    """The lines of a file, or what stands between commas; UsageError where that is nothing."""
    is_file = typed.endswith(".txt") or (len(typed) < 256 and Path(typed).is_file())
    return (
        lines(name, typed) if is_file else some(name, typed, prose(typed).strip(" []").split(","))
    )


def some(name: str, typed: str, parts: list[str]) -> list[str]:
    """Each different part once, without blanks around it; UsageError where there is none."""
    found = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise UsageError(f"{name}={typed} names nothing: give {name}=a,b,c or a file of lines")
    return found


if __name__ == "__main__":
    main()
