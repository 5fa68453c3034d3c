"""FSDP2 on two processes: graft, then shard. Every process saves (`fg.save_adapter` alike), one of them writes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from task import SPEC, base, collate, groups, loss, rows, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxgraft as fg


def work(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=processes)
    model = fg.rewrite(base(), SPEC)
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(groups(model))  # after sharding: these are the parameters that train
    own = rows(256)[rank::processes]
    for start in range(0, len(own), 8):
        model(**collate(own[start : start + 8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "final")
    after = loss(model)
    if rank == 0:
        (folder / "loss").write_text(str(after))
    dist.destroy_process_group()


def main(folder: Path) -> tuple[float, float]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    mp.spawn(work, (2, folder.resolve()), nprocs=2)
    return float((folder / "loss").read_text()), loss(fg.load_adapter(base(), folder / "final"))


if __name__ == "__main__":
    run(main)
