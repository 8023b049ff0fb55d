"""The command line: parse, call one function, print. Heavy imports stay inside the commands."""

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from medi3d.cli_features import classify, features
from medi3d.cli_weights import weights_app
from medi3d.errors import ConfigError, Medi3dError, SourceError
from medi3d.options import (
    Fps,
    InChannels,
    Isotropic,
    JsonFile,
    Overrides,
    Plan,
    RunFolder,
    Source,
    Spacing,
    Weights,
    plan_of,
    refuse_for_artifact,
    triple,
    whole_triple,
    write_json,
)

app = typer.Typer(
    name="medi3d",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn any pretrained 2D or video network into a 3D encoder for CT and MRI, prove it exact, "
    "train it, and learn whether it helped.",
)
app.add_typer(weights_app, name="weights")
app.command()(classify)
app.command()(features)


def main() -> None:
    """Entry point: an expected error ends in one line and exit code 1; `--debug` shows where it came from."""
    # Threads that wait by spinning cost ten times the CPU where cores are shared; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv or bool(os.environ.get("MEDI3D_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except Medi3dError as error:
        if debug:
            raise
        fail(error)
    except KeyboardInterrupt:
        typer.echo("medi3d: stopped", err=True)
        raise SystemExit(130) from None


def fail(error: Exception) -> None:
    """End the program with the error as one line on stderr."""
    typer.echo(f"medi3d: {' '.join(str(error).split())}", err=True)
    raise SystemExit(1)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medi3d {metadata.version('medi3d')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def inflate(
    source: Source,
    isotropic: Isotropic = False,
    plan: Plan = None,
    spacing: Spacing = None,
    fps: Fps = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Kernels over depth: mean (default), centre, factorised, repeat or acs."),
    ] = None,
    in_channels: InChannels = 1,
    weights: Weights = None,
    allow_inexact: Annotated[bool, typer.Option(help="Keep a network that failed its proof.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the encoder to this .safetensors file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Inflate a 2D network to 3D, prove it exact, print what was done.

    Example: medi3d inflate timm:resnet18 --isotropic --out resnet18.safetensors
    """
    from medi3d.console import print_inflation
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


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A .safetensors file.")], json_file: JsonFile = None
) -> None:
    """Repeat the proof of exactness on a saved artifact.

    Example: medi3d verify resnet18.safetensors
    """
    from medi3d.console import print_proof
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


@app.command()
def inspect(
    source: Source,
    plan: Plan = None,
    spacing: Spacing = None,
    fps: Fps = None,
    in_channels: InChannels = 1,
    size: Annotated[
        int, typer.Option(min=1, help="Edge of the cube for which operations are counted, voxels.")
    ] = 96,
    json_file: JsonFile = None,
) -> None:
    """Show stages, kernels, strides, receptive fields, parameters and operations, without weights.

    Receptive fields are in voxels, and in mm (--spacing) or ms (--fps). An artifact keeps its own plan; then
    these two only say what its voxels stand for.

    Example: medi3d inspect timm:resnet18 --spacing 5,1,1
    """
    from medi3d.console import print_inspection
    from medi3d.models.inspection import inspect_source

    refuse_for_artifact(source, plan=plan)
    chosen = plan_of(False, plan, spacing, fps)
    report = inspect_source(source, chosen, in_channels=in_channels, size=size)
    print_inspection(report, triple(spacing), fps)
    write_json(json_file, report)


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="A YAML file; data.root is enough, the rest is chosen.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is written; prepared/NAME if not given.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="GB that a training step may take; else as the device allows."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read.")] = os.cpu_count() or 1,
    json_file: JsonFile = None,
) -> None:
    """Check a cohort, print its fingerprint, choose the rest of its config, and cache its cases.

    Example: medi3d prepare cohort.yaml data.root=my_msd_folder data.modality=CT
    """
    from medi3d.prepare import default_memory_gb, run_prepare

    memory_gb = default_memory_gb() if memory is None else memory
    write_json(json_file, run_prepare(config, overrides or [], out, memory_gb=memory_gb, workers=workers))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Train as a config says; the run is kept in runs/NAME. With torchrun, on many GPUs or machines.

    With data.folds=5 data.fold=all five networks are trained, in runs/NAME/fold0 and so on, and every case is
    judged by the one that has not seen it.

    Example: medi3d train configs/segmentation/hippocampus_i3d.yaml training.steps=200
    """
    from medi3d.config import load_config
    from medi3d.transfer.crossvalidation import run_folds
    from medi3d.transfer.experiment import is_crossvalidation
    from medi3d.transfer.training import run_training

    experiment = load_config(config, overrides or [])
    folder = runs / experiment.name
    if is_crossvalidation(experiment):
        _show_folds(run_folds(experiment, folder, resume=resume), "validation", json_file)
        return
    last = run_training(experiment, folder, resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's processes, one speaks
        typer.echo(f"{folder}: best validation score {last['best']:.4f} after {last['step']} steps")
        write_json(json_file, last)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/pretraining/.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Pretrain an encoder on volumes without labels; it is kept as runs/NAME/encoder.safetensors.

    Example: medi3d pretrain configs/pretraining/i3d_restoration.yaml training.steps=200
    """
    from medi3d.config import load_config
    from medi3d.transfer.training import run_training

    experiment = load_config(config, overrides or [])
    if experiment.task != "pretraining":
        raise ConfigError(f"{config}: task is {experiment.task!r}; `medi3d train` is for that")
    last = run_training(experiment, runs / experiment.name, resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(f"{last['artifact']}: sha256 {last['sha256']}, after {last['steps']} steps")
        write_json(json_file, last)


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="training, validation, or a split of the cohort's list.")] = (
        "validation"
    ),
    json_file: JsonFile = None,
) -> None:
    """Judge the best network of a run case by case: cases.csv, pictures and report.html.

    Of a run of all folds each case is judged by the one that has not seen it; another split, by all together.

    Example: medi3d evaluate runs/hippocampus_i3d
    """
    from medi3d.config import load_run
    from medi3d.console import print_rows
    from medi3d.transfer.crossvalidation import evaluate_folds
    from medi3d.transfer.evaluation import run_evaluation, summary
    from medi3d.transfer.experiment import is_crossvalidation

    experiment = load_run(run)
    if is_crossvalidation(experiment):
        _show_folds(evaluate_folds(experiment, run, split), split, json_file)
        return
    means = summary(run_evaluation(experiment, run, split))
    print_rows(f"Mean over the {split} cases", [{"label": name, **row} for name, row in means.items()])
    write_json(json_file, means)


def _show_folds(table: list[dict[str, Any]], split: str, json_file: Path | None) -> None:
    from medi3d.console import print_rows
    from medi3d.transfer.crossvalidation import spoken

    if table:  # torchrun's other processes have none
        print_rows(f"All folds, {split}: mean over the cases (95 % interval)", spoken(table))
        write_json(json_file, table)


@app.command()
def predict(
    run: RunFolder,
    inputs: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, NRRD or MHA files, folders of a DICOM series, or folders of these."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks and predictions.csv.")],
    ensemble: Annotated[
        list[Path] | None, typer.Option(help="A further run to average with; may be given several times.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="same (as the scan), nii, nii.gz, nrrd, mha, or seg: DICOM SEG too.")
    ] = "same",
    memory: Annotated[float | None, typer.Option(help="GB of main memory to keep below.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict finished scans again.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Segment scans with the best network of a run; each mask lies on the grid of its scan.

    A run of all folds is an ensemble of them.

    A run that was stopped goes on: masks that this network made of these very files are kept.

    Example: medi3d predict runs/hippocampus_i3d scan.nii.gz dicom_folder --out masks
    """
    from medi3d.config import load_run
    from medi3d.transfer.prediction import PredictionOptions, run_prediction

    others = [(load_run(other), other) for other in ensemble or ()]
    options = PredictionOptions(format=format, memory_gb=memory, overwrite=overwrite)
    written, failed = run_prediction(load_run(run), run, inputs, out, ensemble=others, options=options)
    for path in written:
        typer.echo(path)
    write_json(json_file, {"written": written, "failed": failed})
    for line in failed:
        typer.echo(f"medi3d: {line}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run folder, or an artifact.")],
    to: Annotated[str, typer.Option(help="onnx, torch (read by torch.export.load), or bundle (MONAI's).")],
    out: Annotated[Path, typer.Option(help="The file to write, .onnx or .pt2; a bundle's folder.")],
    size: Annotated[str, typer.Option(help="Depth, height and width of the input, voxels.")] = "64,64,64",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Let sizes vary; takes minutes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a run's best network, or an artifact's encoder, as a file that runs without medi3d.

    A bundle is run by MONAI's own commands, with medi3d installed: python -m monai.bundle run.

    Example: medi3d export resnet18.safetensors --to onnx --out resnet18.onnx --size 64,96,96
    """
    from medi3d.config import load_run

    if to == "bundle":
        from medi3d.transfer.bundle import export_bundle

        typer.echo(f"wrote {export_bundle(load_run(source), source, out)}")
        write_json(json_file, {"path": out, "format": to})
        return
    from medi3d.models.artifact import load_artifact
    from medi3d.models.export import export_network
    from medi3d.transfer.prediction import Predictor

    shape = whole_triple(size, "--size")
    network = load_artifact(source) if source.is_file() else Predictor.load(load_run(source), source).network
    report = export_network(network, out, to=to, size=shape, dynamic=dynamic)  # type: ignore[arg-type]
    sizes = f"inputs of {tuple(report.shape)} only"
    if dynamic:
        sizes = "any size" if report.any_size else "any size with the same remainders"
    typer.echo(f"wrote {out}: {sizes}; differs from the network by {report.max_rel_error:.1e}")
    write_json(json_file, report.to_dict())


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/compare/.")],
    overrides: Overrides = None,
    executor: Annotated[str, typer.Option(help="Who computes the runs: local, or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, local; as many as the cores allow.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; finished runs are kept.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the comparison's folder.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Does pretraining help? All arms, seeds and numbers of labels of a config, judged pair by pair.

    Example: medi3d compare configs/compare/hippocampus_small.yaml
    """
    from medi3d.config import load_comparison
    from medi3d.console import print_effects
    from medi3d.transfer.compare import run_comparison
    from medi3d.transfer.executor import make_executor

    comparison, resolve = load_comparison(config, overrides or [])
    folder = runs / comparison.name
    computed = make_executor(executor, workers, comparison.gpus)
    results = run_comparison(comparison, resolve, folder, computed, resume=resume)
    print_effects(results)
    typer.echo(f"{folder / 'report.html'}")
    effects, overall = ([f.row() for f in found] for found in (results.findings, results.overall))
    write_json(json_file, {"answer": results.answer, "effects": effects, "overall": overall})
    for cell, why in results.failed.items():
        typer.echo(f"medi3d: run {cell} failed: {why}", err=True)
    if results.failed:
        raise typer.Exit(1)


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Tell what works on this machine: versions, devices, operators, memory, disk, weights.

    Example: medi3d doctor
    """
    from medi3d.console import print_rows
    from medi3d.doctor import examine

    findings = examine()
    print_rows("medi3d on this machine", findings)
    write_json(json_file, findings)


@app.command()
def quickstart(
    config: Annotated[Path, typer.Argument(help="A comparison.")] = Path("configs/compare/quickstart.yaml"),
    out: Annotated[Path, typer.Option(help="Folder for runs, masks and page.")] = Path("runs/quickstart"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what is there already.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Show all of it on virtual subjects, in minutes: weights, proof, training, masks, one page.

    Example: medi3d quickstart
    """
    from medi3d.quickstart import run_quickstart

    write_json(json_file, run_quickstart(config, out, fresh=fresh))
