"""The order of examples and their random numbers: the same for every number of processes, micro-batches and workers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from velora.errors import ConfigError
from velora.run.order import StepBatches, TrainingData


def batches(num_examples=70, batch_size=16, micro=4, rank=0, processes=1, drop_last=False, seed=3, lengths=None):
    return StepBatches(
        num_examples, batch_size, micro,
        drop_last=drop_last, seed=seed, rank=rank, num_processes=processes, lengths=lengths,
    )  # fmt: skip


def steps(num_examples, batch_size, micro, processes, **options):
    """The examples of each step over all processes, from what each process gets."""
    ranks = [list(batches(num_examples, batch_size, micro, rank, processes, **options)) for rank in range(processes)]
    assert len({len(found) for found in ranks}) == 1  # all take part in every micro-batch
    assert len(ranks[0]) == len(batches(num_examples, batch_size, micro, 0, processes, **options))
    per_step = batch_size // (micro * processes)
    found = []
    for start in range(0, len(ranks[0]), per_step):
        found.append([key.number for rank in ranks for part in rank[start : start + per_step] for key in part])
    return found


@pytest.mark.parametrize(("micro", "processes"), [(16, 1), (4, 1), (8, 2), (2, 2), (4, 4)])
def test_a_step_has_the_same_examples_however_it_is_divided(micro, processes):
    whole = [sorted(step) for step in steps(70, 16, 16, 1)]
    assert [sorted(step) for step in steps(70, 16, micro, processes)] == whole
    assert sorted(itertools.chain(*whole)) == list(range(70))
    assert [len(step) for step in whole] == [16, 16, 16, 16, 6]


def test_the_order_is_torchs_permutation_of_seed_and_epoch():
    found = batches(drop_last=True)
    found.epoch = 2
    expected = torch.randperm(70, generator=torch.Generator().manual_seed(3 + 2)).tolist()[:64]
    assert [key.number for part in found for key in part] == expected
    assert {key.epoch for part in found for key in part} == {2}


@pytest.mark.parametrize(("num_examples", "batch_size"), [(70, 4), (9, 4), (1000, 2), (64, 64)])
def test_grouped_by_length_as_transformers_does_it(num_examples, batch_size):
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = np.random.default_rng(0).integers(5, 500, num_examples).tolist()
    found = batches(num_examples, batch_size, batch_size, lengths=lengths)
    for found.epoch in (0, 2):
        generator = torch.Generator().manual_seed(3 + found.epoch)
        expected = get_length_grouped_indices(lengths, batch_size, generator=generator)
        assert [key.number for part in found for key in part] == expected
        assert lengths[expected[0]] == max(lengths)


def test_grouping_by_length_is_the_same_however_a_step_is_divided_and_wherever_it_continues():
    lengths = list(range(70))
    whole = [sorted(step) for step in steps(70, 16, 16, 1, lengths=lengths)]
    assert [sorted(step) for step in steps(70, 16, 2, 2, lengths=lengths)] == whole
    assert sorted(itertools.chain(*whole)) == lengths
    data = data_of(Noisy(), lengths=range(12))
    data.start_epoch(4)  # three steps an epoch: this is the second one
    again = [batch["index"] for batch in data.loader()]
    next(data.first_step())  # goes back to the first epoch
    data.start_epoch(4)
    assert [batch["index"] for batch in data.loader()] == again
    assert sorted(itertools.chain(*again)) == list(range(12))


def test_drop_last_ends_with_the_last_whole_batch():
    """VTAB-1k as SSF, Hydra and NOAH train it: 1000 images in batches of 64 are 15 steps an epoch."""
    assert batches(1000, 64, 64, drop_last=True).steps_per_epoch == 15
    assert batches(1000, 64, 64).steps_per_epoch == 16
    assert len(batches(1000, 64, 32, drop_last=True)) == 30


def test_drop_last_without_a_whole_batch_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.drop_last=true: 10 training examples .* trainer.batch_size=16"):
        batches(10, 16, drop_last=True)


def test_a_process_without_an_example_gets_one_again():
    assert [len(step) for step in steps(17, 16, 4, 4)] == [16, 4]
    assert len(set(steps(17, 16, 4, 4)[1])) == 1


class Noisy:
    """Examples that draw from all three generators, as augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


class NoisyStream(IterableDataset):
    def __iter__(self):
        for index in range(12):
            yield index, random.random(), float(np.random.rand()), float(torch.rand(()))


def collate(examples):
    return {"index": [e[0] for e in examples], "noise": [e[1:] for e in examples], "mixed": float(torch.rand(()))}


def data_of(examples, micro=4, **options):
    return TrainingData(
        examples,
        collate,
        batch_size=options.pop("batch_size", 4),
        micro_batch_size=micro,
        drop_last=False,
        seed=options.pop("seed", 0),
        **options,
    )


def noise(batches):
    return {index: values for batch in batches for index, values in zip(batch["index"], batch["noise"], strict=True)}


def test_random_numbers_belong_to_an_example():
    expected = noise(data_of(Noisy()).loader())
    assert len({value for values in expected.values() for value in values}) == 36
    assert noise(data_of(Noisy(), micro=2).loader()) == expected
    assert noise(data_of(Noisy()).loader(num_workers=2)) == expected
    later = data_of(Noisy())
    later.start_epoch(3)  # three steps an epoch
    assert set(noise(later.loader()).values()).isdisjoint(expected.values())
    assert noise(data_of(Noisy(), seed=1).loader()) != expected


@pytest.mark.parametrize("examples", [Noisy(), NoisyStream()], ids=["examples", "stream"])
def test_fetching_leaves_no_trace(examples):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    data = data_of(examples)
    first = next(data.first_step())
    iterator = iter(data.loader(generator=torch.Generator()))
    assert next(iterator) == first
    list(iterator)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_a_stream_repeats_whatever_was_drawn_meanwhile():
    whole = list(data_of(NoisyStream()).loader())
    interrupted = []
    for batch in data_of(NoisyStream()).loader():
        torch.rand(3)
        random.random()
        interrupted.append(batch)
    assert interrupted == whole


def test_first_step_of_a_stream_is_that_of_the_process():
    (second,) = data_of(NoisyStream(), rank=1, num_processes=2, micro=3, batch_size=6).first_step()
    assert second["index"] == [3, 4, 5]


@pytest.mark.parametrize("examples", [Noisy(), NoisyStream()], ids=["examples", "stream"])
@pytest.mark.parametrize(("micro", "processes"), [(12, 1), (2, 1), (3, 2)])
def test_first_step_is_the_same_however_it_is_divided(examples, micro, processes):
    found = []
    for rank in range(processes):
        data = data_of(examples, batch_size=12, micro=micro, rank=rank, num_processes=processes)
        batches = list(data.first_step())
        assert [len(batch["index"]) for batch in batches] == [micro] * (12 // micro // processes)
        if processes == 1:
            loader = iter(data.loader())
            assert [next(loader) for _ in batches] == batches
        found += [number for batch in batches for number in batch["index"]]
    whole = next(data_of(examples, batch_size=12, micro=12).first_step())
    assert sorted(found) == sorted(whole["index"])
