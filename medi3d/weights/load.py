"""Fill a network with published weights, and say of every tensor what became of it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.errors import WeightsError
from medi3d.inflation.kernels import adapt_channels, inflate_kernel
from medi3d.inflation.network import Inflated
from medi3d.weights.catalogue import find_weights, get_row
from medi3d.weights.files import read_tensors
from medi3d.weights.keymaps import KeyMap, get_keymap
from medi3d.weights.rows import WeightsRow

RGB = 3


@dataclass
class LoadReport:
    """What became of every tensor: each of ours is in one of the first four lists.

    Counters of normalisation steps (`num_batches_tracked`) are no weights and are not counted.
    """

    weights: str
    matched: list[str] = field(default_factory=list)
    """Copied as published."""
    inflated: list[str] = field(default_factory=list)
    """2D kernels spread over depth."""
    adapted: list[str] = field(default_factory=list)
    """Kernels brought from RGB to another number of input channels (and inflated, where due)."""
    fresh: list[str] = field(default_factory=list)
    """Left as initialised, by request."""
    dropped: list[str] = field(default_factory=list)
    """Published tensors that were not used: dropped by the table, for a part that the network lacks, or for a
    tensor left fresh."""

    @property
    def counts(self) -> dict[str, int]:
        """Length of each list."""
        return {name: len(value) for name, value in asdict(self).items() if isinstance(value, list)}

    @property
    def fraction(self) -> float:
        """Share of our tensors that were filled."""
        filled = len(self.matched) + len(self.inflated) + len(self.adapted)
        return filled / max(1, filled + len(self.fresh))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "counts": self.counts, "fraction": self.fraction}


def load_weights(
    module: nn.Module,
    weights: str | Path | WeightsRow,
    *,
    expect_missing: Iterable[str] = (),
    keymap: KeyMap | str | None = None,
) -> LoadReport:
    """Fill `module` in place, completely or not at all.

    2D kernels fit a 2D network, or an inflated one, where they are spread over depth by the profile that it
    was inflated with (`mean` for a bare network of rules). A kernel for RGB fits any number of channels.

    Args:
        module: a 2D network, an `Inflated` one or its `.network`.
        weights: a row of the catalogue or its name, `file:PATH`, or the path of a file.
        expect_missing: glob patterns of our names that stay as they are, such as "Logits.*".
        keymap: a key map or its name, in place of the row's own.

    Raises:
        WeightsError: the file is missing or unsafe, a published tensor has no place here, one of ours is not
            filled, or the shapes do not fit. The module is unchanged then.
    """
    row = weights if isinstance(weights, WeightsRow) else get_row(_row_name(weights))
    if isinstance(module, Inflated):
        network, profile = module.network, module.profile
    else:
        network, profile = module, "mean"
    names = get_keymap(keymap) if isinstance(keymap, str) else keymap
    if names is None and row.keymap is not None:
        names = get_keymap(row.keymap)
    path = find_weights(row)
    loader = _Loader(network, path, tuple(expect_missing), LoadReport(row.name))
    return loader.load(read_tensors(path), names, profile)


def inflate_state(net2d: nn.Module, net3d: nn.Module, profile: str = "mean") -> LoadReport:
    """Fill a 3D network with the weights of its 2D twin, completely or not at all.

    For libraries that build one architecture for two and for three dimensions under the same names, as MONAI
    does: kernels are spread over depth, everything else is copied. `verify(net2d, net3d)` proves the result.

    Args:
        net2d: the source, with kernels `(O, I, kH, kW)`; not changed.
        net3d: the same architecture with kernels `(O, I, kD, kH, kW)`, filled in place. A first layer for
            another number of channels takes RGB kernels as `adapt_channels` says.
        profile: how a kernel is spread over its taps, see `medi3d.inflation.kernels`.

    Raises:
        WeightsError: the networks are not twins; the tensor that does not fit is named.
    """
    name = f"2D {type(net2d).__name__}"
    return _Loader(net3d, Path(name), (), LoadReport(name)).load(net2d.state_dict(), None, profile)


def _row_name(weights: str | Path) -> str:
    path = Path(weights)
    return f"file:{path}" if isinstance(weights, Path) or (path.suffix and path.is_file()) else str(weights)


class _Loader:
    """One loading: the network, the file that is read (for messages), and the report as it grows."""

    def __init__(
        self, network: nn.Module, path: Path, expect_missing: tuple[str, ...], report: LoadReport
    ) -> None:
        self.ours = network.state_dict()
        self.path = path
        self.expect_missing = expect_missing
        self.report = report

    def load(self, published: Mapping[str, Tensor], keymap: KeyMap | None, profile: str) -> LoadReport:
        filled: dict[str, Tensor] = {}
        for key, our_key in self._places(published, keymap).items():
            if our_key is None or self._is_expected_missing(our_key):
                self.report.dropped.append(key)
                continue
            tensor = published[key]
            tensor = keymap.to_our_layout(our_key, tensor) if keymap else tensor
            filled[our_key] = self._fit(our_key, tensor, profile, keymap.stem if keymap else None)
        self.report.fresh = [key for key in self.ours if key not in filled and not _is_counter(key)]
        unfilled = [key for key in self.report.fresh if not self._is_expected_missing(key)]
        if unfilled:
            raise WeightsError(f"{self.path}: nothing in it fills {_first_few(unfilled)} of the network")
        with torch.no_grad():
            for key, tensor in filled.items():
                self.ours[key].copy_(tensor)
        return self.report

    def _places(self, published: Mapping[str, Tensor], keymap: KeyMap | None) -> dict[str, str | None]:
        """For each published key our key, or None for one that is not used; none may be unknown."""
        table = {key: key for key in self.ours} if keymap is None else keymap.table
        unknown = [key for key in published if key not in table and not (keymap and keymap.drops(key))]
        unknown = [key for key in unknown if not (keymap is None and self._is_expected_missing(key))]
        if unknown:
            raise WeightsError(f"{self.path}: {_first_few(unknown)} of the file has no place in the network")
        scaled = [k for k in published if keymap and keymap.must_be_one(k) and not (published[k] == 1).all()]
        if scaled:
            raise WeightsError(
                f"{self.path}: {_first_few(scaled)} of the file must be one, the norms here have no scale"
            )
        places = {key: table.get(key) for key in published}
        return {key: ours if ours in self.ours else None for key, ours in places.items()}

    def _fit(self, our_key: str, tensor: Tensor, profile: str, stem: str | None) -> Tensor:
        """The published tensor in our shape, noted in the report."""
        ours, kind = self.ours[our_key], self.report.matched
        fitted = tensor
        is_kernel = ours.dim() in (4, 5) and tensor.dim() in (4, 5)
        if is_kernel and ours.shape[1] != tensor.shape[1] and (tensor.shape[1] == RGB or our_key == stem):
            fitted, kind = adapt_channels(fitted, ours.shape[1]), self.report.adapted
        if (ours.dim(), fitted.dim()) == (5, 4):
            fitted = inflate_kernel(fitted, ours.shape[2], profile)
            kind = self.report.inflated if kind is self.report.matched else kind
        if fitted.shape != ours.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(ours.shape)} in the network"
            raise WeightsError(f"{self.path}: {our_key} is {shapes}")
        if not _is_counter(our_key):
            kind.append(our_key)
        return fitted

    def _is_expected_missing(self, our_key: str) -> bool:
        return any(fnmatchcase(our_key, pattern) for pattern in self.expect_missing)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _first_few(keys: list[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
