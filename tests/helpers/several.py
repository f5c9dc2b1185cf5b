"""The same work in several processes of a gloo group."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist


def several(world: int, work: Callable[[], object], folder: Path) -> list:
    """What `work` returns in each of `world` processes; they meet in a file in `folder`.

    They are forks of this process, so that nothing need be imported or sent again.
    """
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    meeting = folder / f"group-{world}"

    def one(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            how = {"init_method": f"file://{meeting}", "rank": rank, "world_size": world}
            dist.init_process_group("gloo", **how)
            result = pickle.dumps(work())  # as bytes: tensors would stay with the process
            told.put((rank, None, result))
            dist.destroy_process_group()
        except BaseException:
            told.put((rank, traceback.format_exc(), None))

    processes = [context.Process(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    found = sorted((told.get(timeout=120) for _ in processes), key=lambda one: one[0])
    for process in processes:
        process.join(30)
    meeting.unlink(missing_ok=True)
    problems = [problem for _, problem, _ in found if problem]
    assert not problems, "\n".join(problems)
    return [pickle.loads(result) for _, _, result in found]
