"""The commands that ask a network about single files: `medi3d classify` and `medi3d features`."""

from pathlib import Path
from typing import Annotated

import typer

from medi3d.options import JsonFile, Plan, window_of, write_json


def classify(
    clip: Annotated[Path, typer.Argument(help="A video file, a GIF, or a folder of pictures.")],
    weights: Annotated[
        str, typer.Option(help="A row of `medi3d weights list` that has classes; two streams: RGB+FLOW.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Name the action in a clip. For rows of optical flow it is computed first, about a second a frame.

    Example: medi3d classify cricket.gif --weights kinetics400/i3d-rgb
    """
    from medi3d.console import print_classes
    from medi3d.transfer.classify import classify_file

    classes = classify_file(clip, weights, top)
    print_classes(classes)
    write_json(json_file, [{"class": name, "probability": p} for name, p in classes])


def features(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Clips or volumes: files, folders of pictures or slices, or of these."),
    ],
    at: Annotated[
        str, typer.Option(help="A layer such as Mixed_5c; or level1, level2, ...: maps, fine first.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME.npz of each input.")],
    network: Annotated[
        str | None,
        typer.Option(help="A run folder, an artifact, or a source; without it the network of --weights."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A row of `medi3d weights list`, timm, or file:PATH.")
    ] = None,
    plan: Plan = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="LOW,HIGH in HU to [-1, 1], for CT; else each volume's percentiles. A run has its own."
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="Means over depth (time), height and width.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write what a network makes of clips or volumes at one of its layers.

    Each NAME.npz holds "features", float32 (C, D, H, W) or pooled (C,), "input_shape" in voxels or frames and
    pixels, for volumes their "spacing" in mm, and the names of end point, network and weights.

    Example: medi3d features clips/*.mp4 --weights kinetics400/i3d-rgb --at Mixed_5c --pooled --out features
    """
    from medi3d.transfer.features import Extractor, are_clips, write_features

    if network is not None and Path(network).is_dir():
        from medi3d.config import load_run
        from medi3d.options import refuse_for_run

        refuse_for_run(weights=weights, plan=plan, window=window)
        extractor = Extractor.of_run(load_run(network), Path(network))
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
