"""What each matrix takes in on unrelated prompts: inputs on which a fine-tune may not act.

    V [d_in, k]   directions that hold a share of the energy of inputs x̂, each of length 1, at every
                  token of prompts that were held out when V was found (`spectrum`)

A change ΔW with ΔW V = 0 leaves the matrix as it was on such inputs, whatever it does on others:
the null space of old inputs as in continual learning (Wang et al. 2021, arXiv:2103.07113; Saha et
al. 2021, arXiv:2103.09762), with unlabelled prompts in place of old tasks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from grasp.bases.spectrum import InputBasis, Moments, choose
from grasp.bases.stream import Batch, Stream
from grasp.data import draw
from grasp.model import Architecture, Matrix, memory, processes
from grasp.progress import Stage

Read = tuple[tuple[int, ...], Sequence[int]]  # a prompt's token ids, and with a continuation's
HELD_OUT = 5  # of so many prompts one is held out
PER_WIDTH = 8  # tokens looked at for each dimension of the widest input, where it takes so many
STABLE = 0.02  # of the energy: how much less V may hold of held-out inputs than of those seen
SHORT = 0.1  # of the energy: how much less than asked a basis may hold before it is told
FEW = 32  # tokens: an expert that fewer are routed to is looked at as if it got all
ROWS = 16  # run side by side
ALIKE = 8  # tokens: long rows are as many times that, so that many run side by side
LONG = 64  # tokens
BUDGET = 2**30  # bytes of moments at a time


class Tokens:
    """The prompts that are looked at, and more of their continuations as they are asked for.

    Args:
        model: which draws more.
        rows: prompts, each also with a continuation.
        most: tokens above which no more are drawn.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Read], most: int):
        self.model, self.most = model, most
        self.longest = max(len(whole) - len(prompt) for prompt, whole in rows)
        prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
        held = set(prompts[HELD_OUT - 1 :: HELD_OUT])
        self.prompts = [list(p) for p in prompts if p not in held]
        self._times = 1
        seen = [row for prompt, row in rows if prompt not in held]
        self.batches = [
            *_batches(seen, False),
            *_batches([row for prompt, row in rows if prompt in held], True),
        ]
        self.count = sum(map(len, seen))

    def more(self) -> list[Batch]:
        """As many again; none if there are enough."""
        added: list[Batch] = []
        for _ in range(self._times):
            if self.count >= self.most:
                break
            drawn = draw(self.model, self.prompts, tokens=self.longest, seed=self._times)
            self._times += 1
            self.count += sum(len(ids) for ids, _ in drawn)
            added += _batches([ids for ids, _ in drawn], False)
        self.batches += added
        return added


def _batches(rows: Sequence[Sequence[int]], held: bool) -> Iterator[Batch]:
    """Rows of one length side by side, so that none is padded, in an order of no meaning.

    Of long ones the last few tokens are left out, so that few lengths differ: for each a processor
    may lay its products out anew, and keep that.
    """
    by_length: dict[int, list] = {}
    for row in rows:
        length = len(row) - (len(row) % ALIKE if len(row) > LONG else 0)
        by_length.setdefault(length, []).append(list(row[:length]))
    chunks = [same[i : i + ROWS] for same in by_length.values() for i in range(0, len(same), ROWS)]
    for i in torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0)).tolist():
        yield Batch(torch.tensor(chunks[i]), held)


def input_bases(
    found: Architecture,
    matrices: Sequence[Matrix],
    rows: Sequence[Read],
    energy: float,
    rank: int | None = None,
    bottom: bool = False,
    quick: bool | None = None,
    free: int | None = None,
) -> Iterator[tuple[list[str], InputBasis]]:
    """What is blocked of each distinct input, a block of the model at a time.

    Args:
        found: the model as it is before the fine-tune.
        matrices: of that model.
        rows: prompts' token ids, and these with a continuation's, whose tokens are looked at.
        energy: share of the inputs' energy on held-out prompts that a basis is to hold, above 0
            and below 1.
        rank: largest k; None sets no limit.
        bottom: as many directions, but those of the least energy: a control.
        quick: look at these tokens alone; else more are drawn while a basis holds
            less on held-out prompts than on its own. None is quick on a CPU.
        free: largest d − k: where more would be left, so many are drawn at random among them.

    Yields:
        The names of the matrices that take one input in, and its basis.
    """
    if quick is None:
        quick = next(found.model.parameters()).device.type == "cpu"
    widest = max(m.in_features for m in matrices)
    tokens = Tokens(found.model, rows, 0 if quick else PER_WIDTH * widest)
    stream = Stream(found.model, found.blocks)
    stream.look([batch.ids[: n + 1] for n, batch in enumerate(tokens.batches[:2])])
    owner = _owners(stream, matrices, tokens.batches[0])
    short: list[str] = []
    few: list[str] = []
    parts = list(_parts(stream, matrices, owner))
    with Stage("Reading what each layer takes in", len(parts), "layers") as stage:
        for n, owners in parts:
            for name, basis in _look(stream, n, owners, tokens, (energy, rank, bottom, free), few):
                if basis.share < energy - SHORT and rank is None and not bottom:
                    short.append(f"{name} ({basis.share:.2f})")
                yield [m.name for m in matrices if owner[m.name] == name], basis
            memory.give_back()
            stage.update()
    _tell(short, len(set(owner.values())), energy)
    _tell_few(few)


def _owners(stream: Stream, matrices: Sequence[Matrix], batch: Batch) -> dict[str, str]:
    """For each matrix the first that took in the same tensor."""
    owner = {m.name: m.name for m in matrices}
    last: list[tuple[Tensor, str]] = []

    def note(name: str) -> Callable:
        def call(x: Tensor, batch: Batch) -> None:
            if not last or x is not last[0][0]:
                last[:] = [(x, name)]
            owner[name] = last[0][1]

        return call

    one = Batch(batch.ids[:1], False)
    stream.whole([one], [(m, note(m.name), True) for m in matrices])
    return owner


def _parts(
    stream: Stream, matrices: Sequence[Matrix], owner: dict[str, str]
) -> Iterator[tuple[int | None, list[Matrix]]]:
    """What is looked at at a time: the block, or None for all of the model, and whose inputs."""
    owners = [m for m in matrices if owner[m.name] == m.name]
    if stream.one_by_one:
        for n, block in enumerate(stream.blocks):
            own = {id(m) for m in block.matrices}
            for chosen in _within_budget([m for m in owners if id(m) in own]):
                yield n, chosen
        inside = {id(m) for block in stream.blocks for m in block.matrices}
        owners = [m for m in owners if id(m) not in inside]
    for chosen in _within_budget(owners):
        yield None, chosen


def _within_budget(owners: list[Matrix]) -> Iterator[list[Matrix]]:
    while owners:
        size, chosen = 0, []
        while owners and (not chosen or size + 4 * owners[0].in_features ** 2 <= BUDGET):
            size += 4 * owners[0].in_features ** 2
            chosen.append(owners.pop(0))
        yield chosen


def _look(
    stream: Stream,
    n: int | None,
    owners: Sequence[Matrix],
    tokens: Tokens,
    options: tuple,
    few: list[str],
) -> Iterator[tuple[str, InputBasis]]:
    """The bases of some matrices' inputs, from as many tokens as they need."""
    moments = {m.name: Moments(m.in_features, stream.device) for m in owners}
    fresh = tokens.batches
    while True:
        _add(stream, n, owners, fresh, moments)
        bases = {name: choose(own, *options) for name, own in moments.items()}
        stable = torch.tensor(all(map(_is_stable, bases.values())))
        (stable,) = processes.from_first([stable])  # drawing takes all of them
        if bool(stable) or not (fresh := tokens.more()):
            break
    seldom = [m for m in owners if m.index is not None and moments[m.name].count < FEW]
    few += [m.name for m in seldom]
    again = {m.name: Moments(m.in_features, stream.device) for m in seldom}
    _add(stream, n, seldom, tokens.batches, again, routed=False)
    yield from (bases | {name: choose(own, *options) for name, own in again.items()}).items()


def _add(
    stream: Stream,
    n: int | None,
    owners: Sequence[Matrix],
    batches: Sequence[Batch],
    moments: dict[str, Moments],
    routed: bool = True,
) -> None:
    """Add what matrices take in of some batches; of an expert that all get, if not `routed`."""

    def see(own: Moments) -> Callable:
        return lambda x, batch: own.add(x.reshape(-1, x.shape[-1]), batch.held)

    if not owners:
        return
    watched = [(m, see(moments[m.name]), routed) for m in owners]
    if n is None:
        stream.whole(batches, watched)
    else:
        stream.through(n, batches, watched)


def _is_stable(basis: InputBasis) -> bool:
    enough = PER_WIDTH * len(basis.directions)
    return basis.sample - basis.share <= STABLE or basis.tokens >= enough


def _tell(short: Sequence[str], inputs: int, energy: float) -> None:
    if short:
        warnings.warn(
            f"on held-out prompts the bases of {len(short)} of {inputs} inputs hold less than "
            f"read={energy}: {', '.join(short[:3])}{' …' if len(short) > 3 else ''}; give more "
            "prompts, or quick=False to draw more from them",
            stacklevel=2,
        )


def _tell_few(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"fewer than {FEW} tokens of the reference reach {len(names)} matrices of experts "
            f"({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), so these are kept off "
            "what they would take in if all tokens reached them; give more prompts, or longer "
            "continuations (tokens)",
            stacklevel=2,
        )
