"""DistributedDataParallel on two processes: each trains on its own rows, one of them saves."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from task import SPEC, base, collate, groups, loss, rows, run
from torch.nn.parallel import DistributedDataParallel

import fxgraft as fg


def work(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    model = DistributedDataParallel(fg.rewrite(base(), SPEC))
    optimizer = torch.optim.AdamW(groups(model))
    own = rows(256)[rank::processes]
    for start in range(0, len(own), 8):
        model(**collate(own[start : start + 8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        fg.save_adapter(model, folder / "final")
        (folder / "loss").write_text(str(loss(model.module)))
    dist.destroy_process_group()


def main(folder: Path) -> tuple[float, float]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    mp.spawn(work, (2, folder.resolve()), nprocs=2)
    return float((folder / "loss").read_text()), loss(fg.load_adapter(base(), folder / "final"))


if __name__ == "__main__":
    run(main)
