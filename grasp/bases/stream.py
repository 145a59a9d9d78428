"""Prompts run through a decoder one block at a time: all that a block takes in is seen at once.

Between two blocks only the hidden states of the prompts are kept. Of a decoder whose blocks can't
be called one after the other (they share states, or their weights are split over processes) the
whole of it is run once more for each few blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from grasp.model import Block, Matrix, evaluating, given, resting, sharding, unfused

See = Callable[[Tensor, "Batch"], None]
Watched = tuple[Matrix, See, bool]  # what it takes in is shown; of an expert, only what it is sent


@dataclass
class Batch:
    """Rows of one length, so that none is padded, all of prompts that are held out or none."""

    ids: Tensor  # [rows, tokens]
    held: bool
    at: int = -1  # the block that comes next; -1 before it is brought to the first
    hidden: Tensor | None = None  # what that block takes in
    before: Tensor | None = None  # what the last one took in
    calls: list[tuple[tuple, dict]] = field(default_factory=list)  # of each block, all else


class _Enough(Exception):
    """What a forward pass was for is done."""


class Stream:
    """A decoder's blocks, each seen in turn by all batches.

    Args:
        model: as it is called in training, adapters and all.
        blocks: of that model, in their order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.model, self.blocks = model, list(blocks)
        self.modules = [block.module for block in self.blocks]
        self.device = next(model.parameters()).device
        self._tuples: list[bool] = []
        self.one_by_one = False
        """Whether the blocks can be called one after the other."""

    def look(self, rows: Sequence[Tensor]) -> None:
        """Find out on a few rows `[n, tokens]` whether the blocks can be called one by one.

        Rows of two shapes show whether a block needs what a pass of its own rows left behind.
        """
        inputs: list[Tensor] = []
        outputs: list = []
        with self._quiet(), ExitStack() as hooks:
            for module in self.modules:
                hook = module.register_forward_pre_hook(
                    lambda m, args, kwargs: inputs.append(given(args, kwargs)), with_kwargs=True
                )
                hooks.callback(hook.remove)
                hook = module.register_forward_hook(lambda m, args, out: outputs.append(out))
                hooks.callback(hook.remove)
            self._run(rows[0])
        self._tuples = [isinstance(out, tuple) for out in outputs]
        if len(inputs) != len(self.modules) or sharding.is_split(self.model):
            return
        batches = [Batch(ids, False) for ids in rows]
        batch = batches[0]
        try:
            with self._quiet():
                self._begin(batches)
                for expected in inputs:
                    if not _same(batch.hidden, expected):
                        return
                    self._advance(batch)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return  # whatever a block misses when it is called alone
        last = outputs[-1][0] if self._tuples[-1] else outputs[-1]
        self.one_by_one = _same(batch.hidden, last)

    def through(self, n: int, batches: Sequence[Batch], watched: Sequence[Watched]) -> None:
        """Bring batches through block `n`, from wherever they are, or through it once more."""
        with self._quiet():
            fresh = [batch for batch in batches if batch.at < 0]
            self._begin(fresh)
            for batch in batches:
                while batch.at < n:
                    self._advance(batch)
            with _hearing(watched) as now:
                for batch in batches:
                    now(batch)
                    if batch.at > n:
                        batch.at, batch.hidden = n, batch.before
                    self._advance(batch)

    def whole(self, batches: Sequence[Batch], watched: Sequence[Watched]) -> None:
        """Bring batches through all of the model."""
        with self._quiet(), _hearing(watched) as now:
            for batch in batches:
                now(batch)
                self._run(batch.ids)

    def _begin(self, batches: Sequence[Batch]) -> None:
        """Bring batches to the first block."""
        with self._recording() as calls:
            for batch in batches:
                calls.clear()
                with suppress(_Enough):
                    self._run(batch.ids)
                batch.at, batch.hidden = 0, given(*calls[0])
                batch.calls = [_without_first(*call) for call in calls]

    def _advance(self, batch: Batch) -> None:
        args, kwargs = batch.calls[batch.at]
        first = next((k for k, v in kwargs.items() if v is _HIDDEN), None)
        module = self.modules[batch.at]
        if first is None:
            out = module(batch.hidden, *args, **kwargs)
        else:
            out = module(*args, **kwargs | {first: batch.hidden})
        batch.before, batch.hidden = batch.hidden, out[0] if isinstance(out, tuple) else out
        batch.at += 1

    def _run(self, ids: Tensor) -> None:
        ids = ids.to(self.device)
        self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        model = self.model
        with evaluating(model), unfused(model), resting(model), torch.no_grad():
            yield

    @contextmanager
    def _recording(self) -> Iterator[list]:
        """Blocks hand on what they are given and are noted with their calls, up to the last."""
        calls: list[tuple[tuple, dict]] = []
        bound = [vars(module).get("forward") for module in self.modules]

        def recorder(is_tuple: bool):
            def forward(*args, **kwargs):
                calls.append((args, kwargs))
                if len(calls) == len(self.modules):
                    raise _Enough
                x = given(args, kwargs)
                return (x,) if is_tuple else x

            return forward

        for module, is_tuple in zip(self.modules, self._tuples, strict=True):
            module.forward = recorder(is_tuple)
        try:
            yield calls
        finally:
            for module, forward in zip(self.modules, bound, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


_HIDDEN = object()


def _without_first(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call without the hidden states, which come first, by position or by name."""
    if args:
        return args[1:], kwargs
    return args, kwargs | {next(iter(kwargs)): _HIDDEN}


def _same(a: Tensor, b: Tensor) -> bool:
    room = 10 * torch.finfo(b.dtype).eps
    return a.shape == b.shape and bool((a - b).norm() <= room * b.norm())


@contextmanager
def _hearing(watched: Sequence[Watched]) -> Iterator[Callable[[Batch], None]]:
    """Hear of what maps take in; what is given tells of which batch from now on."""
    now: list[Batch] = []

    def hear_of(call: See):
        def hear(x: Tensor, tokens: Tensor | None) -> None:
            call(x, now[0])

        return hear

    with ExitStack() as handles:
        for matrix, call, routed in watched:
            handles.callback(matrix.watch(hear_of(call), routed).remove)
        yield lambda batch: now.__setitem__(slice(None), [batch])
