"""Sample i depends on the seed and on i alone."""

import random

import numpy as np
import pytest
import torch

from medi3d.datasets.sampling.stream import (
    MemoryCache,
    StreamBatches,
    TrainingStream,
    collate,
    seeded,
    training_loader,
    validation_loader,
)
from medi3d.errors import ConfigError, DataError

NAMES = ["a", "b", "c", "d", "e"]


def load(name):
    return {
        "image": torch.zeros(1, 2, 2, 2),
        "label": torch.zeros(1, 2, 2, 2),
        "name": name,
        "spacing": (1, 1, 1),
    }


def draw(sample):
    numbers = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])  # noqa: NPY002
    return {**sample, "image": numbers}


def stream(seed=0):
    return TrainingStream(NAMES, load, draw, seed)


def drawn(loader):
    return [(batch["name"], batch["image"].tolist()) for batch in loader]


def test_each_epoch_shows_every_case_once_in_its_own_order():
    epochs = [[stream().item_of(5 * epoch + i) for i in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_sample_is_the_same_whenever_it_is_asked_for():
    first, again = stream()[7], [stream()[i] for i in (3, 7)][1]
    assert first["name"] == again["name"]
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], stream()[12]["image"])
    assert not torch.equal(first["image"], stream(seed=1)[7]["image"])


def test_generators_of_the_caller_are_left_alone():
    def state():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = state()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    stream()[0]
    with seeded(3, 4):
        state()
    assert state() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_resuming_change_nothing(workers):
    whole = drawn(training_loader(stream(), StreamBatches(0, 6, 2)))
    rest = drawn(training_loader(stream(), StreamBatches(4, 6, 2), workers))
    assert rest == whole[4:]


def test_ranks_together_see_what_one_process_sees():
    alone = list(StreamBatches(2, 5, 4))
    ranks = [list(StreamBatches(2, 5, 4, rank=r, ranks=2)) for r in range(2)]
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == alone
    cases = [batch["name"] for r in range(2) for batch in validation_loader(NAMES[r::2], load)]
    assert sorted(name for names in cases for name in names) == NAMES


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"training.batch_size: 3 samples cannot be shared evenly by 2"):
        StreamBatches(0, 1, 3, ranks=2)


def test_no_case_is_an_error():
    with pytest.raises(DataError, match="the training split is empty"):
        TrainingStream([], load)


def test_the_cache_reads_once_and_keeps_to_its_limit():
    read = []

    def counting(name):
        read.append(name)
        return load(name)

    cache = MemoryCache(counting, 2 * 64)  # two samples of 2 x 8 voxels of 4 bytes
    for name in NAMES * 2:
        assert cache(name)["name"] == name
    assert read == [*NAMES, *NAMES[2:]]


def test_a_batch_keeps_what_the_engine_needs():
    batch = collate([load("a"), load("b")])
    assert batch["name"] == ["a", "b"]
    assert batch["image"].shape == (2, 1, 2, 2, 2)
    assert set(batch) == {"image", "label", "name"}
