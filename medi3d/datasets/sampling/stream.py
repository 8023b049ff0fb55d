"""Endless, repeatable training samples: sample number i depends only on the seed and on i.

Training draws sample numbers 0, 1, 2, ... Which case a number means, and every random decision made for it,
follow from `(seed, number)` alone. So neither the number of worker processes, nor the number of training
processes, nor a resumed run changes what the network sees.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from medi3d.errors import ConfigError, DataError

Sample = dict[str, Any]
"""Keys "image" `(C, D, H, W)`, "label" and "name"; a volume also has "spacing" in mm, (D, H, W)."""

BATCH_KEYS = ("image", "label", "name")
"""The keys of a sample that go into a batch."""


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python with `words`; restore them afterwards."""
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - TorchIO and others use it
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(state[0]) << 31 | int(state[1]))
        np.random.seed(state)  # noqa: NPY002
        random.seed(int(state[0]))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


class TrainingStream(Dataset):
    """Training samples by number.

    Number i belongs to epoch `i // len(items)`; each epoch visits every item once, in its own order.

    Args:
        items: the cases, whatever `load` understands.
        load: item -> sample, without randomness (it may be cached).
        transform: sample -> sample, random: patch, augmentation. It must not write into its input.
        seed: of the order and of all random draws.

    Raises:
        DataError: `items` is empty.
    """

    def __init__(
        self,
        items: Sequence[Any],
        load: Callable[[Any], Sample],
        transform: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
    ):
        if not items:
            raise DataError("no training case: the training split is empty")
        self.items, self.load, self.transform, self.seed = items, load, transform, seed

    def item_of(self, number: int) -> int:
        """Index of the item that sample `number` shows."""
        epoch, position = divmod(number, len(self.items))
        return int(np.random.default_rng([self.seed, epoch]).permutation(len(self.items))[position])

    def __getitem__(self, number: int) -> Sample:
        with seeded(self.seed, number):
            sample = self.load(self.items[self.item_of(number)])
            return self.transform(sample) if self.transform else sample


class StreamBatches(Sampler[list[int]]):
    """The sample numbers of each step, for one of `ranks` processes.

    Step s has the numbers `[s * batch_size, (s + 1) * batch_size)`; rank r takes every `ranks`-th of them
    from r on, so that all processes together see the samples that one process would.

    Raises:
        ConfigError: `batch_size` is not divisible by the number of processes.
    """

    def __init__(self, start: int, steps: int, batch_size: int, *, rank: int = 0, ranks: int = 1):
        if batch_size % ranks:
            raise ConfigError(
                f"training.batch_size: {batch_size} samples cannot be shared evenly by {ranks} processes; "
                f"give a multiple of {ranks}"
            )
        self.start, self.steps, self.batch_size = start, steps, batch_size
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            first = step * self.batch_size
            yield list(range(first + self.rank, first + self.batch_size, self.ranks))


class MemoryCache:
    """Cache the results of `load` up to a number of bytes; cases beyond it are read each time.

    Fill it before worker processes are started: forked workers share its memory.
    """

    def __init__(self, load: Callable[[Any], Sample], limit_bytes: float):
        self._load, self._free = load, limit_bytes
        self._samples: dict[Any, Sample] = {}

    def __call__(self, item: Any) -> Sample:
        """The sample of `item`; its tensors are shared between calls and must not be written to."""
        if item in self._samples:
            return dict(self._samples[item])
        sample = self._load(item)
        size = sum(v.numel() * v.element_size() for v in sample.values() if isinstance(v, torch.Tensor))
        if size <= self._free:
            self._free -= size
            self._samples[item] = sample
        return dict(sample)


def collate(samples: list[Sample]) -> Sample:
    """One batch of the keys in `BATCH_KEYS`: image `(B, C, D, H, W)`, label, and the list of names."""
    return default_collate([{key: sample[key] for key in BATCH_KEYS if key in sample} for sample in samples])


def training_loader(stream: TrainingStream, batches: StreamBatches, workers: int = 0) -> DataLoader:
    """Batches of `stream` in the order of `batches`, made in `workers` processes (0: in this one)."""
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


class _Loaded(Dataset):
    """The items, loaded one by one."""

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Sample]):
        self.items, self.load = items, load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        return self.load(self.items[index])


def validation_loader(items: Sequence[Any], load: Callable[[Any], Sample]) -> DataLoader:
    """Load whole cases, one per batch, since their sizes differ."""
    return DataLoader(_Loaded(items, load), batch_size=1, collate_fn=collate)
