"""`medi3d predict`, `classify` and `export`."""

from pathlib import Path
from typing import Annotated

import typer

from medi3d.cli.options import (
    JsonFile,
    RunFolder,
    whole_triple,
    write_json,
)


def predict(
    run: RunFolder,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Files (NIfTI, NRRD, MHA), folders of a DICOM series (FOLDER#3: number 3), folders of these."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder for the masks and predictions.csv.")],
    ensemble: Annotated[
        list[Path] | None, typer.Option(help="A further run to average with; repeatable.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="same (as the scan), nii, nii.gz, nrrd, mha, or seg: DICOM SEG too.")
    ] = "same",
    memory: Annotated[float | None, typer.Option(help="Memory limit, GB.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict again scans whose mask is up to date.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Segment scans with the best network of a run; each mask lies on the grid of its scan.

    The folds of a cross-validation predict as an ensemble. Rerunning skips scans whose mask is up to date.

    Example: medi3d predict runs/hippocampus_i3d scan.nii.gz dicom_folder --out masks
    """
    from medi3d.experiment.run import Run
    from medi3d.prediction.predict import PredictionOptions, run_prediction

    runs = [Run.open(folder) for folder in (run, *(ensemble or ()))]
    options = PredictionOptions(format=format, memory_gb=memory, overwrite=overwrite)
    written, failed = run_prediction(runs, inputs, out, options)
    for path in written:
        typer.echo(path)
    write_json(json_file, {"written": written, "failed": failed})
    for line in failed:
        typer.echo(f"medi3d: {line}", err=True)
    if failed:
        raise typer.Exit(1)


def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or an artifact.")],
    to: Annotated[str, typer.Option(help="onnx, torch (of torch.export), torchscript, or bundle (MONAI's).")],
    out: Annotated[Path, typer.Option(help="The file to write, .onnx, .pt2 or .pt; a bundle's folder.")],
    size: Annotated[str, typer.Option(help="Depth, height and width of the input, voxels.")] = "64,64,64",
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Accept inputs of any size; takes minutes.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a run's best network, or an artifact's encoder, as a file that runs without medi3d.

    A bundle is run by MONAI's own commands, with medi3d installed: python -m monai.bundle run.

    Example: medi3d export resnet18.safetensors --to onnx --out resnet18.onnx --size 64,96,96
    """
    from medi3d.experiment.run import Run

    if to == "bundle":
        from medi3d.export.bundle import export_bundle

        typer.echo(f"wrote {export_bundle(Run.open(source), out)}")
        write_json(json_file, {"path": out, "format": to})
        return
    from medi3d.export.network import export_network
    from medi3d.models.artifact import load_artifact
    from medi3d.prediction.predict import Predictor

    shape = whole_triple(size, "--size")
    network = load_artifact(source) if source.is_file() else Predictor.load(Run.open(source)).network
    report = export_network(network, out, to=to, size=shape, dynamic=dynamic)  # type: ignore[arg-type]
    shown = ("B" if report.any_batch else 1, *report.shape[1:])
    sizes = f"inputs of ({', '.join(map(str, shown))}) only"
    if dynamic:
        sizes = "any size" if report.any_size else "any size with the same remainders"
    typer.echo(f"wrote {out}: {sizes}; differs from the network by {report.max_rel_error:.1e}")
    write_json(json_file, report.to_dict())


def classify(
    clip: Annotated[Path, typer.Argument(help="A video file, a GIF, or a folder of pictures.")],
    weights: Annotated[
        str, typer.Option(help="A row of `medi3d weights list` that has classes; two streams: RGB+FLOW.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Name the action in a clip. Optical flow, where the weights need it, takes about a second per frame.

    Example: medi3d classify cricket.gif --weights kinetics400/i3d-rgb
    """
    from medi3d.cli.tables import print_classes
    from medi3d.prediction.classify import classify_file

    classes = classify_file(clip, weights, top)
    print_classes(classes)
    write_json(json_file, [{"class": name, "probability": p} for name, p in classes])
