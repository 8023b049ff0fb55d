"""Fill a network with published weights, and report what happened to every tensor."""

import logging
from collections.abc import Callable, Iterable, Mapping
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
from medi3d.weights.files import read_weights
from medi3d.weights.keymaps import KeyMap, get_keymap
from medi3d.weights.matching import Match, Matcher
from medi3d.weights.rows import WeightsRow

RGB = 3
log = logging.getLogger("medi3d")


@dataclass
class LoadReport:
    """What happened to every tensor: each of ours is in one of the first four lists.

    Counters of normalisation steps (`num_batches_tracked`) are not weights and are not counted.
    """

    weights: str
    matched: list[str] = field(default_factory=list)
    """Copied as published."""
    inflated: list[str] = field(default_factory=list)
    """2D kernels spread over depth."""
    adapted: list[str] = field(default_factory=list)
    """Kernels adapted from RGB to another number of input channels (and inflated, if 2D)."""
    fresh: list[str] = field(default_factory=list)
    """Left as initialised, by request."""
    dropped: list[str] = field(default_factory=list)
    """Published tensors that were not used: dropped by the table, for a part that the network lacks, or for a
    tensor left fresh."""

    part: str = ""
    """Which part of the file was taken: keys of dictionaries, joined with "/"; "": all of it."""
    notes: list[str] = field(default_factory=list)
    """What was chosen, left out or is unknown, one line each."""
    licences: list[str] = field(default_factory=list)
    """Licences of the weights and of all weights that they were trained from."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors in each of the five lists."""
        return {name: len(getattr(self, name)) for name in _FATES}

    @property
    def fraction(self) -> float:
        """Share of our tensors that were filled."""
        filled = len(self.matched) + len(self.inflated) + len(self.adapted)
        return filled / max(1, filled + len(self.fresh))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "counts": self.counts, "fraction": self.fraction}


_FATES = ("matched", "inflated", "adapted", "fresh", "dropped")


def load_weights(
    module: nn.Module,
    weights: str | Path | WeightsRow,
    *,
    expect_missing: Iterable[str] = (),
    keymap: KeyMap | str | None = None,
    whole: Callable[[], nn.Module | None] = lambda: None,
    keep_stem: bool = False,
) -> LoadReport:
    """Fill `module` in place, completely or not at all.

    2D kernels fit a 2D network, or an inflated one, which spreads them over depth by its inflation profile
    (`mean` for a bare network of rules). A kernel for RGB fits any number of channels, and the first kernel
    may have any number of channels.

    Names are those of the network or of a key map, which is found by the file's names; otherwise they are
    compared as in `medi3d.weights.matching`. A classifier's tensors are left out and reported.

    Args:
        module: a 2D network, an `Inflated` one or its `.network`.
        weights: a row of the catalogue or its name, `file:PATH`, `hf:ORG/NAME`, or the path of a file; `#KEY`
            behind a path chooses one of several sets of weights.
        expect_missing: glob patterns of our names that stay as they are, such as "Logits.*".
        keymap: a key map or its name, in place of the row's own.
        whole: returns the full network whose encoder is `module`; its other tensors may be in the file.
        keep_stem: give the first convolution of a 2D network the file's number of channels.

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
    content = read_weights(path, row.part)
    report = LoadReport(row.name, part=content.part, notes=list(content.notes), licences=list(row.licences))
    loader = _Loader(network, path, tuple(expect_missing), report, whole, keep_stem)
    loader.load(content.tensors, names, profile)
    for note in report.notes:
        log.info(f"{path}: {note}")
    return report


def inflate_state(net2d: nn.Module, net3d: nn.Module, profile: str = "mean") -> LoadReport:
    """Fill a 3D network with the weights of its 2D twin, completely or not at all.

    For libraries that build one architecture for two and for three dimensions under the same names, as MONAI
    does: kernels are spread over depth, everything else is copied. `verify(net2d, net3d)` proves the result.

    Args:
        net2d: the source, with kernels `(O, I, kH, kW)`; not changed.
        net3d: the same architecture with kernels `(O, I, kD, kH, kW)`, filled in place. A first layer for
            another number of channels gets RGB kernels by `adapt_channels`.
        profile: how a kernel is spread over its taps, see `medi3d.inflation.kernels`.

    Raises:
        WeightsError: the networks are not twins; the message names the tensor that does not fit.
    """
    name = f"2D {type(net2d).__name__}"
    return _Loader(net3d, Path(name), (), LoadReport(name)).load(net2d.state_dict(), None, profile)


def _row_name(weights: str | Path) -> str:
    path = Path(weights)
    return f"file:{path}" if isinstance(weights, Path) or path.is_file() else str(weights)


class _Loader:
    """One load: the network, the file that is read (for messages), and the report as it grows."""

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        expect_missing: tuple[str, ...],
        report: LoadReport,
        whole: Callable[[], nn.Module | None] = lambda: None,
        keep_stem: bool = False,
    ) -> None:
        self.network = network
        self.ours = network.state_dict()
        self.path = path
        self.expect_missing = expect_missing
        self.report = report
        self.whole = whole
        self.stem = next((key for key, tensor in self.ours.items() if tensor.dim() in (4, 5)), None)
        self.keep_stem = keep_stem and _is_free_stem(network, self.stem)

    def load(self, published: Mapping[str, Tensor], keymap: KeyMap | None, profile: str) -> LoadReport:
        match = self._places(published, keymap)
        keymap = match.keymap
        self.stem = (keymap and keymap.stem) or self.stem
        filled: dict[str, Tensor] = {}
        for key, our_key in match.places.items():
            if our_key is None or self._is_expected_missing(our_key):
                self.report.dropped.append(key)
                continue
            tensor = match.tensors[key]
            tensor = keymap.to_our_layout(our_key, tensor) if keymap else tensor
            filled[our_key] = self._fit(our_key, tensor, profile)
        self.report.fresh = [key for key in self.ours if key not in filled and not _is_counter(key)]
        unfilled = [key for key in self.report.fresh if not self._is_expected_missing(key)]
        if unfilled:
            raise WeightsError(f"{self.path}: nothing in it fills {_first_few(unfilled)} of the network")
        with torch.no_grad():
            for key, tensor in filled.items():
                if self.ours[key].shape != tensor.shape:
                    _widen(self.network, key, tensor)
                else:
                    self.ours[key].copy_(tensor)
        return self.report

    def _places(self, published: Mapping[str, Tensor], keymap: KeyMap | None) -> Match:
        """Our key for each published key, or None for an unused one; unknown keys are an error."""
        if keymap is not None:
            places = {key: keymap.table.get(key) for key in published}
            match = Match(published, {k: ours if ours in self.ours else None for k, ours in places.items()})
            match.keymap = keymap
            match.unknown = [key for key in published if key not in keymap.table and not keymap.drops(key)]
        else:
            inner = getattr(self.network, "model", None)
            matcher = Matcher(self.ours, self._fits, self._is_optional, self.whole, inner)
            try:
                match = matcher.match(published)
            except WeightsError as error:
                raise WeightsError(f"{self.path}: {error}") from error
            if match.unknown:
                hint = matcher.hint(match)
                raise WeightsError(
                    f"{self.path}: {_first_few(match.unknown)} of the file has no place in the network{hint}"
                )
            self.report.notes += match.notes
        if match.unknown:
            raise WeightsError(
                f"{self.path}: {_first_few(match.unknown)} of the file has no place in the network"
            )
        must_be_one = match.keymap.must_be_one if match.keymap else lambda key: False
        scaled = [key for key in published if must_be_one(key) and not bool((published[key] == 1).all())]
        if scaled:
            raise WeightsError(
                f"{self.path}: {_first_few(scaled)} of the file must be 1: the norms here have no scale"
            )
        return match

    def _fits(self, our_key: str, tensor: Tensor) -> bool:
        """Whether a tensor can be adapted to our shape."""
        ours = self.ours[our_key].shape
        shape = tensor.shape
        if (len(ours), len(shape)) == (5, 4):
            shape = torch.Size((*shape[:2], ours[2], *shape[2:]))
        return shape == ours or (
            self._may_adapt(our_key, tensor) and (shape[:1], shape[2:]) == (ours[:1], ours[2:])
        )

    def _may_adapt(self, our_key: str, tensor: Tensor) -> bool:
        """Whether a kernel may be for another number of input channels."""
        is_kernel = self.ours[our_key].dim() in (4, 5) and tensor.dim() in (4, 5)
        return is_kernel and (tensor.shape[1] == RGB or our_key == self.stem)

    def _fit(self, our_key: str, tensor: Tensor, profile: str) -> Tensor:
        """The published tensor in our shape, noted in the report."""
        ours, kind = self.ours[our_key], self.report.matched
        fitted, expected = tensor, ours.shape
        if fitted.shape[1:2] != ours.shape[1:2] and self._may_adapt(our_key, tensor):
            if self.keep_stem and our_key == self.stem:
                expected = torch.Size((ours.shape[0], tensor.shape[1], *ours.shape[2:]))
            else:
                fitted, kind = adapt_channels(fitted, ours.shape[1]), self.report.adapted
        if (ours.dim(), fitted.dim()) == (5, 4):
            fitted = inflate_kernel(fitted, ours.shape[2], profile)
            kind = self.report.inflated if kind is self.report.matched else kind
        if fitted.shape != expected:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(ours.shape)} in the network"
            raise WeightsError(f"{self.path}: {our_key} is {shapes}")
        if not _is_counter(our_key):
            kind.append(our_key)
        return fitted

    def _is_optional(self, our_key: str) -> bool:
        return _is_counter(our_key) or self._is_expected_missing(our_key)

    def _is_expected_missing(self, our_key: str) -> bool:
        return any(fnmatchcase(our_key, pattern) for pattern in self.expect_missing)


def _is_free_stem(network: nn.Module, stem: str | None) -> bool:
    """Whether the first kernel belongs to a plain convolution of all channels."""
    path, _, name = (stem or "").rpartition(".")
    layer = dict(network.named_modules()).get(path)
    return isinstance(layer, nn.Conv2d) and name == "weight" and layer.groups == 1


def _widen(network: nn.Module, key: str, kernel: Tensor) -> None:
    """Give the convolution of `key` a kernel for another number of input channels."""
    layer: Any = network.get_submodule(key.rpartition(".")[0])
    layer.weight = nn.Parameter(kernel.to(layer.weight).clone(), requires_grad=layer.weight.requires_grad)
    layer.in_channels = kernel.shape[1]


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _first_few(keys: list[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
