"""Several real processes that work together, by gloo."""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in a process that others are forked from: it has run nothing and has no threads.
multiprocessing.set_forkserver_preload(["transformers", "peft", "accelerate", "tests.models"])


def together(work, folder, *args, count: int = 2) -> list:
    """What `work(rank, folder, *args)` returned in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (work, folder, port, count, args)
    mp.start_processes(_process, arguments, nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, work, folder, port: int, count: int, args) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    where["OMP_NUM_THREADS"] = 1  # by which accelerate sets threads anew
    os.environ |= {k: str(v) for k, v in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        torch.save(work(rank, folder, *args), folder / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
