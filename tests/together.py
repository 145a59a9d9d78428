"""Several real processes that work together, by gloo."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(work, folder, *args, count: int = 2) -> list:
    """What `work(rank, folder, *args)` returned in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (work, folder, port, count, args), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, work, folder, port: int, count: int, args) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        torch.save(work(rank, folder, *args), folder / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
