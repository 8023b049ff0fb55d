"""`medi3d features`."""

from pathlib import Path
from typing import Annotated

import typer

from medi3d.cli.options import JsonFile, Plan, window_of, write_json


def features(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Clips or volumes: files, folders of pictures or slices, or folders of these."),
    ],
    at: Annotated[
        str, typer.Option(help="A layer such as Mixed_5c; or level1, level2, ...: maps, fine first.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME.npz of each input.")],
    network: Annotated[
        str | None,
        typer.Option(help="A run folder, an artifact or a source (default: the network of --weights)."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A row of `medi3d weights list`, timm, or file:PATH.")
    ] = None,
    plan: Plan = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="CT window LOW,HIGH in HU; default: per-volume percentiles. Not with a run folder."
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Means over depth (time), height and width.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a layer's feature maps for clips or volumes.

    Each NAME.npz holds "features", float32 (C, D, H, W) or pooled (C,), "input_shape" in voxels or frames and
    pixels, for volumes their "spacing" in mm, and the names of end point, network and weights.

    Example: medi3d features clips/*.mp4 --weights kinetics400/i3d-rgb --at Mixed_5c --pooled --out features
    """
    from medi3d.prediction.features import Extractor, are_clips, write_features

    if network is not None and Path(network).is_dir():
        from medi3d.cli.options import refuse_for_run
        from medi3d.experiment.run import Run

        refuse_for_run(weights=weights, plan=plan, window=window)
        extractor = Extractor.of_run(Run.open(network))
    else:
        clips = (network is None and weights is not None) or are_clips(inputs)
        extractor = Extractor.of_source(network, weights, plan=plan, clips=clips, window=window_of(window))
    rows, failed = write_features(extractor, inputs, out, at, pooled=pooled)
    for row in rows:
        typer.echo(f"{row['path']} {row['shape']}")
    write_json(json_file, {"written": rows, "failed": failed})
    for line in failed:
        typer.echo(f"medi3d: {line}", err=True)
    if failed:
        raise typer.Exit(1)
