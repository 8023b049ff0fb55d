"""Kernel plans: the kernel, stride and padding of every layer along the new axis.

A plan is data. In CT or MRI resampled to isotropic voxels the new axis is like the others
(`isotropic`); in video it is time and keeps its own pace (`video`); where slices are thick it is
held back until in-plane voxels have grown as large as the slices (`from_spacing`, the "pacing of
receptive field growth" of the I3D paper, sec. 2.5, in millimetres); at other frame rates than
I3D's it keeps I3D's pace in milliseconds (`from_fps`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from medi3d.errors import PlanError

Padding = Literal["replicate", "zeros", "valid"]
Pace = int | Literal["in-plane"]
AttentionForm = Literal["joint", "windows", "divided"]
Statistics = Literal["slice", "volume"]
Kind = Literal["conv", "max_pool", "avg_pool", "resample", "upsample", "attention", "statistics", "other"]

ALL_SLICES = 0
"""`DepthLayer.kernel` for attention over all slices."""

I3D_FPS = 25.0
"""Frame rate of I3D's clips, for which its plan was chosen."""


@dataclass(frozen=True)
class LayerGeometry:
    """What a layer does in-plane, measured in one run of the 2D network."""

    path: str
    kind: Kind
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    in_plane_stride: float = 1.0
    """Pixels of the network's input per pixel of this layer's input."""
    ordinal: int = 0
    """Number of layers of the same kind that ran before this one."""


@dataclass(frozen=True)
class DepthLayer:
    """A layer along depth: taps, stride, dilation (slices) and padding; attention and statistics."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: Padding = "replicate"
    attention_form: AttentionForm = "joint"
    statistics: Statistics = "slice"


@dataclass(frozen=True)
class Override:
    """Other depth settings for the layers whose path matches the glob `pattern`."""

    pattern: str
    kernel: int | None = None
    stride: int | None = None
    padding: Padding | None = None
    attention_form: AttentionForm | None = None
    statistics: Statistics | None = None
    optional: bool = False
    """Whether a network may lack the layer, in a plan for many networks; otherwise that is an error."""


@dataclass(frozen=True)
class KernelPlan:
    """How a 2D network is spread along depth.

    Make one with `isotropic`, `video`, `planar`, `from_spacing`, `from_fps` or `from_yaml`.
    """

    name: str
    kernel: Pace = "in-plane"
    """Depth taps of convolutions and pools: as in-plane, or a number (1 keeps slices apart)."""
    stride: Pace = "in-plane"
    padding: Padding = "replicate"
    attention: int | Literal["all"] = 3
    """Slices that attention joins: one and its neighbours, those of a window, or all (1: each alone)."""
    attention_form: AttentionForm = "joint"
    """How attention joins slices.

    joint: queries see keys and values of neighbouring slices, or of all. windows: the windows of a
    Swin transformer hold `attention` slices, and shift along depth where they shift in-plane (Video
    Swin: Liu et al. 2022, arXiv:2106.13230). divided: each block gets one more attention, over depth
    at the same place, which starts at zero (TimeSformer: Bertasius et al. 2021, arXiv:2102.05095).
    """
    statistics: Statistics = "slice"
    """What squeeze-excitation, group norms and similar layers take means and variances over.

    With divided attention, also whether each slice has a class token, or the volume has one (TimeSformer).
    """
    held_max_pools: int = 0
    """Number of leading max-pools with kernel and stride 1 along depth (I3D: 2)."""
    spacing: tuple[float, float, float] | None = None
    """Voxel size (depth, height, width) in mm that decides how long depth is held back; None: isotropic."""
    fps: float | None = None
    """Frame rate of the clips, to keep I3D's pace in milliseconds; None: no pacing by time."""
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that no layer could have."""
        for key in ("kernel", "stride"):
            value = getattr(self, key)
            if value != "in-plane" and not (isinstance(value, int) and value >= 1):
                raise PlanError(f"plan {self.name!r}: {key} is {value!r}; use 'in-plane' or an integer >= 1")
        if self.padding not in ("replicate", "zeros"):
            raise PlanError(f"plan {self.name!r}: padding is {self.padding!r}; use 'replicate' or 'zeros'")
        if self.spacing is not None and not (
            len(self.spacing) == 3 and all(0 < s < 1e4 for s in self.spacing)
        ):
            raise PlanError(f"plan {self.name!r}: spacing is {self.spacing}; give three sizes above 0 mm")
        _check_choices(f"plan {self.name!r}", self)
        self._check_attention()
        if self.fps is not None and not 0.1 <= self.fps <= 1e4:
            raise PlanError(f"plan {self.name!r}: fps is {self.fps}; give frames per second, 0.1 to 10000")
        if self.fps is not None and self.spacing is not None:
            raise PlanError(f"plan {self.name!r} has both spacing and fps: depth is either space or time")
        for override in self.overrides:
            _check_override(self.name, override)

    def _check_attention(self) -> None:
        reach, windows = self.attention, self.attention_form == "windows"
        if reach == "all" and not windows:
            return
        if not (isinstance(reach, int) and reach >= 1 and (windows or reach % 2 == 1)):
            fit = "an integer >= 1" if windows else "an odd integer >= 1, or 'all'"
            raise PlanError(f"plan {self.name!r}: attention is {reach!r}; use {fit}")

    @classmethod
    def isotropic(cls) -> "KernelPlan":
        """Depth as in-plane, symmetric: for isotropic voxels."""
        return cls(name="isotropic")

    @classmethod
    def video(cls) -> "KernelPlan":
        """I3D's plan (paper, fig. 3): first two max-pools 1×3×3, last average pool 2×7×7, zero padding."""
        pool = Override("*avg_pool", kernel=2, stride=1, padding="valid", optional=True)
        return cls(name="video", padding="zeros", held_max_pools=2, overrides=(pool,))

    @classmethod
    def planar(cls) -> "KernelPlan":
        """Depth kernel and stride 1: the 2D network on every slice."""
        return cls(name="planar", kernel=1, stride=1, attention=1)

    @classmethod
    def from_spacing(cls, spacing: Sequence[float]) -> "KernelPlan":
        """Depth held back while slices are at least twice as thick as in-plane voxels are wide.

        Args:
            spacing: voxel size (depth, height, width) in mm.

        Raises:
            PlanError: not three positive numbers.
        """
        return cls(name="spacing", spacing=tuple(float(s) for s in spacing))  # type: ignore[arg-type]

    @classmethod
    def from_fps(cls, fps: float) -> "KernelPlan":
        """I3D's pacing in milliseconds, for clips of another frame rate; at 25 fps it is `video`.

        I3D (paper, sec. 2.5) lets one position span 80 ms at its first level, holds time there until
        a position is 8 pixels wide, and ends at 320 ms for 32 pixels. At half the rate, steps along
        time are halved; at twice the rate, they are doubled, within in-plane strides: by powers of
        two, and never more than in-plane. Kernels keep their taps where time is not held.

        This assumes the motion of I3D's clips, in pixels per millisecond (224×224
        pixels, scenes of people). For frames of half the width, or motion half as fast in pixels, give
        twice the rate.

        Args:
            fps: frames per second of the clips.

        Raises:
            PlanError: not a number from 0.1 to 10000.
        """
        return replace(cls.video(), name="fps", held_max_pools=0, fps=float(fps))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "KernelPlan":
        """Read a plan as `to_dict` writes it.

        Raises:
            PlanError: the file is missing or malformed, or has an unknown key.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanError(f"cannot read the plan {path}: {_first_line(error)}") from error
        if not isinstance(content, Mapping):
            raise PlanError(f"the plan {path} holds {type(content).__name__}; it must be keys and values")
        return cls.from_dict({"name": Path(path).stem, **content})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "KernelPlan":
        """Undo `to_dict`.

        Raises:
            PlanError: unknown key or impossible value.
        """
        content = dict(content)
        _refuse_unknown(content, cls, f"plan {content.get('name')!r}")
        overrides = content.pop("overrides", None) or ()
        for entry in overrides:
            _refuse_unknown(entry, Override, f"an override of plan {content.get('name')!r}")
        if content.get("spacing") is not None:
            content["spacing"] = tuple(float(s) for s in content["spacing"])
        try:
            return cls(**content, overrides=tuple(Override(**entry) for entry in overrides))
        except TypeError as error:
            raise PlanError(f"plan {content.get('name')!r}: {_first_line(error)}") from error

    @classmethod
    def named(cls, name_or_path: str | Path) -> "KernelPlan":
        """The plan with that name (isotropic, video, planar), or from that YAML file.

        Raises:
            PlanError: neither a name nor a file.
        """
        builtin = {"isotropic": cls.isotropic, "video": cls.video, "planar": cls.planar}
        if str(name_or_path) in builtin:
            return builtin[str(name_or_path)]()
        if Path(name_or_path).is_file():
            return cls.from_yaml(name_or_path)
        raise PlanError(f"no plan {str(name_or_path)!r}: use {', '.join(builtin)} or the path of a YAML file")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for YAML, JSON and an artifact's metadata."""
        content = asdict(self)
        content["overrides"] = [
            {k: v for k, v in asdict(o).items() if v not in (None, False)} for o in self.overrides
        ]
        content["spacing"] = list(self.spacing) if self.spacing else None
        return content

    def layer(self, geometry: LayerGeometry) -> DepthLayer:
        """Kernel, stride, dilation and padding along depth for one layer."""
        stride = self._depth_stride(geometry)
        kernel = self._depth_kernel(geometry, stride)
        if geometry.kind == "attention":
            kernel, stride = ALL_SLICES if self.attention == "all" else self.attention, 1
        if geometry.kind == "max_pool" and geometry.ordinal < self.held_max_pools:
            kernel = stride = 1
        layer = DepthLayer(
            kernel, stride, max(geometry.dilation), self.padding, self.attention_form, self.statistics
        )
        for override in self.overrides:
            if fnmatchcase(geometry.path, override.pattern):
                settings = _SETTINGS.get(geometry.kind, ("kernel", "stride", "padding"))
                changes = {k: getattr(override, k) for k in settings}
                layer = replace(layer, **{k: v for k, v in changes.items() if v is not None})
        return layer

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Refuse an override that names no layer of the network.

        Raises:
            PlanError: naming the pattern and a few of the paths that there are.
        """
        for override in self.overrides:
            if not override.optional and not any(fnmatchcase(p, override.pattern) for p in paths):
                known = ", ".join(paths[:5])
                raise PlanError(
                    f"plan {self.name!r} overrides {override.pattern!r}, but no layer has that name; "
                    f"layers are {known}, ..."
                )

    def depth_stride_at(self, in_plane_stride: float) -> int:
        """Slices per position where one position spans `in_plane_stride` voxels in-plane."""
        if self.stride != "in-plane":
            return 1
        if self.fps is not None:
            pace = 2.0 ** round(math.log2(self.fps / I3D_FPS))
            return max(1, round(min(in_plane_stride, max(2 * pace, in_plane_stride * pace / 4))))
        return max(1, round(in_plane_stride / self._hold_factor()))

    def _hold_factor(self) -> int:
        """In-plane stride from which depth keeps pace: a power of two, 1 for isotropic voxels."""
        if self.spacing is None:
            return 1
        depth, height, width = self.spacing
        return max(1, 2 ** math.floor(math.log2(depth / math.sqrt(height * width)) + 1e-9))

    def _depth_stride(self, geometry: LayerGeometry) -> int:
        if self.stride != "in-plane":
            return self.stride if max(geometry.stride) > 1 and geometry.kind != "upsample" else 1
        if self.spacing is None and self.fps is None:
            return max(geometry.stride)
        before = self.depth_stride_at(geometry.in_plane_stride)
        if geometry.kind == "upsample":
            return before // self.depth_stride_at(geometry.in_plane_stride / max(geometry.stride))
        return self.depth_stride_at(geometry.in_plane_stride * max(geometry.stride)) // before

    def _depth_kernel(self, geometry: LayerGeometry, stride: int) -> int:
        in_plane = max(geometry.kernel)
        if self.kernel != "in-plane":
            return min(self.kernel, in_plane)
        if geometry.in_plane_stride < self._hold_factor() * 0.99:
            return stride  # held back: no kernel wider than the stride, which is 1 or starts to catch up
        held = self.fps is not None and stride < max(geometry.stride)
        if held and (geometry.kind != "conv" or geometry.kernel == geometry.stride):
            return stride  # a pool, or patches: I3D's 1×3×3
        return in_plane


_SETTINGS: dict[Kind, tuple[str, ...]] = {
    "attention": ("kernel", "attention_form", "statistics"),
    "statistics": ("statistics",),
    "other": (),
}
"""Settings that an override changes in layers that are neither convolution nor pool."""

_CHOICES = {"attention_form": ("joint", "windows", "divided"), "statistics": ("slice", "volume")}


def _check_choices(where: str, settings: "KernelPlan | Override") -> None:
    for key, choices in _CHOICES.items():
        value = getattr(settings, key)
        if value not in choices and not (value is None and isinstance(settings, Override)):
            raise PlanError(f"{where}: {key} is {value!r}; use one of {', '.join(choices)}")


def _check_override(plan: str, override: Override) -> None:
    for key in ("kernel", "stride"):
        value = getattr(override, key)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise PlanError(f"plan {plan!r}, {override.pattern!r}: {key} is {value!r}; use an integer >= 1")
    _check_choices(f"plan {plan!r}, {override.pattern!r}", override)
    if override.padding not in (None, "replicate", "zeros", "valid"):
        raise PlanError(
            f"plan {plan!r}, {override.pattern!r}: padding is {override.padding!r}; "
            "use replicate, zeros or valid"
        )


def _refuse_unknown(content: Mapping[str, Any], cls: type, where: str) -> None:
    if not isinstance(content, Mapping):
        raise PlanError(f"{where} is {content!r}; it must be keys and values")
    known = [field.name for field in fields(cls)]
    for key in content:
        if key not in known:
            raise PlanError(f"{where} has the unknown key {key!r}; it may have {', '.join(known)}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
