"""Which examples make up each step, and with which random numbers they are made.

Both are functions of the seed, the epoch and the example alone. So the number of processes, of micro-batches and of loading
workers changes nothing, a run that continues sees what the interrupted one would have seen, and fetching a batch early
(as Trainer does on resume, before it restores the random state) leaves no trace in the random numbers of the training.

    B  examples of a step (trainer.batch_size)     W  processes     K  micro-batches of a step in each process
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from velora.errors import ConfigError

POOL_STEPS = 50  # of transformers' Trainer


class Key(NamedTuple):
    """An example's place: what its random numbers are drawn from."""

    epoch: int
    number: int


class StepBatches(Sampler[list[Key]]):
    """The micro-batches of one process, epoch by epoch: a random order of all examples, cut into steps of B.

    A whole step is B / (W K) examples for each micro-batch. The last step of an epoch may be shorter: it is cut into as few
    rounds of W nearly equal parts as fit the micro-batch size (dropped with `drop_last`). Where it has fewer examples than
    there are processes, the processes left over get its first one once more, since each must take part in the step.

    With the `lengths` of the examples the order is that of transformers' group_by_length: the random order is cut into pools of
    up to 50 steps, each pool is sorted with its longest example first, and the longest example of all begins.
    """

    def __init__(
        self, num_examples: int, batch_size: int, micro_batch_size: int, *,
        drop_last: bool, seed: int, rank: int, num_processes: int, lengths: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.lengths = lengths
        self.num_examples, self.batch_size, self.micro_batch_size = num_examples, batch_size, micro_batch_size
        self.seed, self.rank, self.num_processes = seed, rank, num_processes
        self.epoch = 0
        remainder = num_examples % batch_size
        self.used = num_examples - remainder if drop_last else num_examples
        if self.used == 0:
            raise ConfigError(
                f"trainer.drop_last=true: {num_examples} training examples do not fill one batch of "
                f"trainer.batch_size={batch_size}; give a smaller batch or trainer.drop_last=false"
            )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.used / self.batch_size)

    def __len__(self) -> int:
        return sum(self._rounds(size) for size in self._step_sizes())

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        if self.lengths is not None:
            order = grouped_by_length(order, self.lengths, self.batch_size)
        start = 0
        for size in self._step_sizes():
            step = order[start : start + size]
            start += size
            parts = self._parts(step)
            for part in parts[self.rank :: self.num_processes]:
                yield [Key(self.epoch, number) for number in part]

    @property
    def rounds_of_first_step(self) -> int:
        """Micro-batches of this process in the first step of an epoch."""
        return self._rounds(self._step_sizes()[0])

    def _step_sizes(self) -> list[int]:
        whole, rest = divmod(self.used, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest else [])

    def _rounds(self, size: int) -> int:
        """Micro-batches of each process in a step of `size` examples."""
        return math.ceil(size / (self.micro_batch_size * self.num_processes))

    def _parts(self, step: list[int]) -> list[list[int]]:
        """The step in rounds x W consecutive parts; process r takes parts r, r + W, ..."""
        num = self._rounds(len(step)) * self.num_processes
        bounds = [len(step) * i // num for i in range(num + 1)]
        return [step[a:b] or step[:1] for a, b in itertools.pairwise(bounds)]


def grouped_by_length(order: list[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """The same examples, so that the steps of `batch_size` in a row are of like length."""
    size = batch_size * max(1, min(len(order) // (4 * batch_size), POOL_STEPS))
    pools = [sorted(order[i : i + size], key=lambda n: -lengths[n]) for i in range(0, len(order), size)]
    longest = max(pools, key=lambda pool: lengths[pool[0]])  # the earliest of several
    pools[0][0], longest[0] = longest[0], pools[0][0]
    return list(itertools.chain(*pools))


class SeededExamples(Dataset):
    """A map-style data set whose examples are made with random numbers of their own (an augmentation, say)."""

    def __init__(self, examples: Any, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[tuple[Key, Any]]:
        found = []
        with _own_randomness():
            for key in keys:
                _seed_all(self.seed, *key)
                found.append((key, self.examples[key.number]))
        return found


class SeededStream(IterableDataset):
    """A stream of examples with random numbers of its own; each loading worker has its own, too."""

    def __init__(self, stream: Any, seed: int) -> None:
        super().__init__()
        self.stream, self.seed = stream, seed

    def __iter__(self) -> Iterator[tuple[Key, Any]]:
        worker = get_worker_info()
        with _own_randomness():
            _seed_all(self.seed, -1, worker.id if worker else 0)
            states = _states()
        examples = iter(self.stream)
        for position in itertools.count():
            with _own_randomness():
                _restore(states)
                try:
                    example = next(examples)
                except StopIteration:
                    return
                states = _states()
            yield Key(0, position), example


class SeededCollate:
    """Collate keyed examples, with random numbers that follow from the first one's key."""

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.collate, self.seed = collate, seed

    def __call__(self, keyed: Sequence[tuple[Key, Any]]) -> Any:
        with _own_randomness():
            _seed_all(self.seed, *keyed[0][0], -1)
            return self.collate([example for _, example in keyed])


class TrainingData:
    """The training examples of a phase, in their order, as this process sees them.

    `examples`: a map-style data set or a stream (IterableDataset). A stream is one endless epoch, its order is its own, and
    accelerate deals its micro-batches out to the processes.
    """

    def __init__(
        self, examples: Any, collate: Callable[[list[Any]], Any], *, batch_size: int, micro_batch_size: int, drop_last: bool,
        seed: int, rank: int = 0, num_processes: int = 1, lengths: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.collate = SeededCollate(collate, seed)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.num_processes = rank, num_processes
        self.batches: StepBatches | None = None
        if isinstance(examples, IterableDataset):
            self.dataset: Dataset = SeededStream(examples, seed)
            return
        self.dataset = SeededExamples(examples, seed)
        self.batches = StepBatches(
            len(examples), batch_size, micro_batch_size,
            drop_last=drop_last, seed=seed, rank=rank, num_processes=num_processes, lengths=lengths,
        )  # fmt: skip

    def loader(self, **options: Any) -> DataLoader:
        """A plain loader; one of a stream still has to be dealt out by `accelerator.prepare`."""
        if self.batches is None:
            return DataLoader(self.dataset, batch_size=self.micro_batch_size, collate_fn=self.collate, **options)
        return DataLoader(self.dataset, batch_sampler=self.batches, collate_fn=self.collate, **options)

    def first_step(self) -> Iterator[Any]:
        """The micro-batches that this process trains on in the first step; each is made when it is asked for."""
        if self.batches is not None:
            self.start_epoch(0)
            for keys in itertools.islice(self.batches, self.batches.rounds_of_first_step):
                yield self.collate(self.dataset.__getitems__(keys))  # type: ignore[attr-defined]
            return
        stream = itertools.islice(iter(self.dataset), self.batch_size)  # type: ignore[arg-type]
        number = 0
        while part := list(itertools.islice(stream, self.micro_batch_size)):
            if number % self.num_processes == self.rank:
                yield self.collate(part)
            number += 1

    def start_epoch(self, step: int) -> None:
        """Order the examples for the epoch that begins at, or contains, optimiser step `step`."""
        if self.batches is not None:
            self.batches.epoch = step // self.batches.steps_per_epoch


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the process's random numbers (Python, NumPy, torch on the CPU)."""
    states = _states()
    try:
        yield
    finally:
        _restore(states)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.random.set_rng_state(states[2])


def _seed_all(*numbers: int) -> None:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)  # not torch.manual_seed: that reaches the GPU's generators too
