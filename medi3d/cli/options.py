"""Options shared by several commands, and their parsers."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from medi3d.errors import Medi3dError, SourceError
from medi3d.files import writing, written_aside

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this JSON file too.")]
Source = Annotated[str, typer.Argument(help="timm:NAME, inception_v1, a 2D source by name, or an artifact.")]

Spacing = Annotated[
    str | None, typer.Option(help="Voxel size DZ,DY,DX in mm; thick slices delay strides along depth.")
]

Fps = Annotated[
    float | None,
    typer.Option("--fps", help="Frames per second of clips; strides over time keep I3D's pace in ms."),
]

Isotropic = Annotated[bool, typer.Option("--isotropic", help="Treat depth like the in-plane axes (default).")]
Plan = Annotated[str | None, typer.Option(help="Kernel plan: isotropic, video, planar, or a YAML file.")]
InChannels = Annotated[int, typer.Option(help="Channels of the volumes.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/NAME.")]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value to override the config, such as training.steps=200.")
]

Weights = Annotated[str | None, typer.Option(help="A row of `medi3d weights list`, timm, or file:PATH.")]


def plan_of(isotropic: bool, plan: str | None, spacing: str | None, fps: float | None = None) -> Any:
    """The one plan that the options ask for."""
    from medi3d.inflation.plan import KernelPlan

    if sum([isotropic, plan is not None, spacing is not None, fps is not None]) > 1:
        raise typer.BadParameter("give only one of --isotropic, --plan, --spacing and --fps")
    if spacing is not None:
        return KernelPlan.from_spacing(triple(spacing) or ())
    if fps is not None:
        return KernelPlan.from_fps(fps)
    return KernelPlan.named(plan or "isotropic")


def refuse_for_artifact(source: str, **options: Any) -> None:
    """Refuse options that an artifact already fixes.

    Raises:
        SourceError: naming the option.
    """
    given = [name for name, value in options.items() if value not in (None, False)]
    if source.endswith(".safetensors") and given:
        raise SourceError(
            f"the artifact {source} has its own plan and profile: leave out --{given[0]}, "
            "or inflate its source"
        )


def refuse_for_run(**options: Any) -> None:
    """Refuse options that a run already fixes.

    Raises:
        SourceError: naming the option.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise SourceError(f"a run has its own network and data settings: leave out --{given[0]}")


def window_of(text: str | None) -> tuple[float, float] | None:
    """Lowest and highest value in HU from "LOW,HIGH"."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--window is {text!r}: give LOW,HIGH in HU, such as -1000,1000") from None
    return (low, high)


def triple(text: str | None) -> tuple[float, float, float] | None:
    """Voxel size in mm from "DZ,DY,DX"."""
    if text is None:
        return None
    try:
        depth, height, width = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--spacing is {text!r}: give DZ,DY,DX in mm, such as 5,1,1") from None
    return (depth, height, width)


def whole_triple(text: str, option: str) -> tuple[int, int, int]:
    """Whole numbers above 0 from "D,H,W"."""
    try:
        depth, height, width = (int(part) for part in text.split(","))
    except ValueError:
        depth = height = width = 0
    if min(depth, height, width) < 1:
        raise typer.BadParameter(f"{option} is {text!r}: give D,H,W in voxels, such as 64,96,96")
    return (depth, height, width)


def write_json(path: Path | None, content: Any) -> None:
    """Write strict JSON atomically; infinities and NaN, which JSON lacks, become null."""
    if path is None:
        return
    text = json.dumps(_finite(json.loads(json.dumps(content, default=str))), indent=2, allow_nan=False)
    with writing(path, Medi3dError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(text + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
