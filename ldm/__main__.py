"""The program `ldm VERB`, also `python -m ldm VERB`: each verb is a file of ldm/cli."""

import os
import runpy
import signal
import sys

from ldm.utils.errors import suggest_nearest

VERBS = {
    "train": "train one stage, or with -m a sweep over settings",
    "sample": "generate images or videos from prompts",
    "evaluate": "measure a run: FID, CLIP score, scene accuracy and more, with intervals",
    "compare": "rank runs: a table, their curves, their samples",
    "prepare": "write images with captions, or drawn scenes, into shards",
    "cache": "encode images and captions once, for trainings without the encoders",
    "phema": "choose the length of the EMA after the training",
    "augment": "generate a data set: shards with captions and labels",
    "clip": "compare images and texts with a CLIP: similarity, search, retrieval",
    "explain": "draw the figures of an introduction to diffusion, from a run",
    "bundle": "write a trained model as one folder, for another machine",
    "export": "write a trained model as a folder that diffusers opens",
    "package": "make trained runs into the parts in ldm/assets",
}


def main() -> None:
    """Runs the verb as `python -m ldm.cli.VERB`, so that the ranks of DDP start the same way."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if os.getcwd() not in sys.path:  # by `ldm`: nor do files of this folder shadow libraries in
        os.environ["PYTHONSAFEPATH"] = "1"  # the jobs and ranks, which `python -m` starts
    if verb in ("--help", "-h"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may leave early, as `head` does
        lines = (f"  {name:<10}{text}" for name, text in VERBS.items())
        print("ldm VERB ...   (ldm VERB --help says more)\n", *lines, sep="\n")
    elif verb not in VERBS:
        near = suggest_nearest(verb, VERBS) or "."
        print(f"ldm: there is no verb '{verb}'{near} ldm --help lists them", file=sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        runpy.run_module(f"ldm.cli.{verb}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
