"""An endless stream of training sequences for a data loader: passes over the documents, one after the other.

Each iteration begins at the first document again, with the same order: an interrupted run skips what it has seen and
goes on with what it would have seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from torch.utils.data import IterableDataset, get_worker_info

from velora.data.language_model import Ids
from velora.errors import ConfigError


class SequenceStream(IterableDataset):
    """Sequences made by `encode` from the documents of `one_pass(0)`, `one_pass(1)`, ... without end.

    With several loading processes, process w of W encodes every W-th group of `group` documents, so that none is seen twice;
    `splits_itself` says that the source of the documents sees to that already.
    """

    def __init__(
        self,
        one_pass: Callable[[int], Iterable[str]],
        encode: Callable[[Iterable[str]], Iterator[Ids]],
        *,
        group: int,
        splits_itself: bool = False,
    ) -> None:
        super().__init__()
        self.one_pass = one_pass
        self.encode = encode
        self.group = group
        self.splits_itself = splits_itself

    def __iter__(self) -> Iterator[Ids]:
        worker = get_worker_info()
        documents = self._passes()
        if worker is None or self.splits_itself:
            return self.encode(documents)
        mine, of = worker.id, worker.num_workers
        return self.encode(d for i, d in enumerate(documents) if i // self.group % of == mine)

    def _passes(self) -> Iterator[str]:
        for number in itertools.count():
            empty = True
            for document in self.one_pass(number):
                empty = False
                yield document
            if empty:
                raise ConfigError("the training shards hold no document with text")
