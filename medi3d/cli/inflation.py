"""`medi3d inflate`, `verify` and `inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from medi3d.cli.options import (
    Fps,
    InChannels,
    Isotropic,
    JsonFile,
    Plan,
    Source,
    Spacing,
    Weights,
    plan_of,
    refuse_for_artifact,
    triple,
    write_json,
)
from medi3d.errors import SourceError


def inflate(
    source: Source,
    isotropic: Isotropic = False,
    plan: Plan = None,
    spacing: Spacing = None,
    fps: Fps = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="How kernels are spread over depth: mean (default), centre, factorised, repeat or acs."
        ),
    ] = None,
    in_channels: InChannels = 1,
    weights: Weights = None,
    allow_inexact: Annotated[bool, typer.Option(help="Keep a network even if its proof failed.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the encoder to this .safetensors file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Inflate a 2D network to 3D, prove it exact, print every layer.

    Example: medi3d inflate timm:resnet18 --isotropic --out resnet18.safetensors
    """
    from medi3d.cli.tables import print_inflation
    from medi3d.models.artifact import check_suffix, save_artifact
    from medi3d.models.encoders import LEAN_UNET, create_encoder
    from medi3d.models.volumetric import VOLUMETRIC

    if source == LEAN_UNET or source in VOLUMETRIC:
        raise SourceError(f"{source} is 3D from the start: there is nothing to inflate")
    refuse_for_artifact(source, isotropic=isotropic, plan=plan, spacing=spacing, fps=fps, profile=profile)
    if out is not None:
        check_suffix(out)  # before the work
    encoder: Any = create_encoder(
        source,
        weights=weights,
        plan=plan_of(isotropic, plan, spacing, fps),
        in_channels=in_channels,
        profile=profile or "mean",
        allow_inexact=allow_inexact,
    )
    print_inflation(encoder.report)
    write_json(json_file, encoder.report.to_dict())
    if out is not None:
        typer.echo(f"wrote {save_artifact(encoder, out)}")


def verify(
    artifact: Annotated[Path, typer.Argument(help="A .safetensors file.")], json_file: JsonFile = None
) -> None:
    """Repeat the proof of exactness on a saved artifact.

    Example: medi3d verify resnet18.safetensors
    """
    from medi3d.cli.tables import print_proof
    from medi3d.errors import InexactError
    from medi3d.models.artifact import load_artifact

    inflation = load_artifact(artifact).report
    report = inflation.exactness
    print_proof(report, inflation.exact_on)
    write_json(json_file, report.to_dict())
    if not report.exact:
        raise InexactError(
            f"{artifact} is not exact: {report.failure} (worst error {report.max_rel_error:.2g})"
        )


def inspect(
    source: Source,
    plan: Plan = None,
    spacing: Spacing = None,
    fps: Fps = None,
    in_channels: InChannels = 1,
    size: Annotated[
        int, typer.Option(min=1, help="Edge length in voxels of the cube for which operations are counted.")
    ] = 96,
    json_file: JsonFile = None,
) -> None:
    """Show stages, kernels, strides, receptive fields, parameters and operations, without weights.

    Receptive fields are in voxels, and in mm (--spacing) or ms (--fps). An artifact keeps its own plan; then
    these two only give its voxel size.

    Example: medi3d inspect timm:resnet18 --spacing 5,1,1
    """
    from medi3d.cli.tables import print_inspection
    from medi3d.models.inspection import inspect_source

    refuse_for_artifact(source, plan=plan)
    chosen = plan_of(False, plan, spacing, fps)
    report = inspect_source(source, chosen, in_channels=in_channels, size=size)
    print_inspection(report, triple(spacing), fps)
    write_json(json_file, report)
