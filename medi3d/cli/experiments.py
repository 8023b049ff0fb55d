"""`medi3d prepare`, `train`, `pretrain`, `evaluate` and `compare`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from medi3d.cli.options import (
    JsonFile,
    Overrides,
    RunFolder,
    write_json,
)
from medi3d.errors import ConfigError


def prepare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file; data.root is enough, the rest is chosen for you.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Output folder (default: prepared/NAME).")] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory limit for a training step, GB (default: what the device has)."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read cases.")] = os.cpu_count() or 1,
    json_file: JsonFile = None,
) -> None:
    """Check a cohort, print its fingerprint, choose the rest of its config, and cache its cases.

    Example: medi3d prepare cohort.yaml data.root=my_msd_folder data.modality=CT
    """
    from medi3d.planning.prepare import default_memory_gb, run_prepare

    memory_gb = default_memory_gb() if memory is None else memory
    write_json(json_file, run_prepare(config, overrides or [], out, memory_gb=memory_gb, workers=workers))


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Train the experiment of a config into runs/NAME. With torchrun, on many GPUs or machines.

    With data.folds=5 data.fold=all, five networks are trained, in runs/NAME/fold0 and so on, and every case
    is scored by the fold that held it out.

    Example: medi3d train configs/segmentation/hippocampus_i3d.yaml training.steps=200
    """
    from medi3d.experiment.config import load_config
    from medi3d.experiment.run import Run
    from medi3d.training.crossvalidation import run_folds
    from medi3d.training.train import run_training

    experiment = load_config(config, overrides or [])
    run = Run(runs / experiment.name, experiment)
    if experiment.is_crossvalidation:
        _show_folds(run_folds(run, resume=resume), "validation", json_file)
        return
    last = run_training(run, resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's processes, one prints
        typer.echo(f"{run.folder}: best validation score {last['best']:.4f} after {last['step']} steps")
        write_json(json_file, last)


def pretrain(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/pretraining/.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Pretrain an encoder on volumes without labels, into runs/NAME/encoder.safetensors.

    Example: medi3d pretrain configs/pretraining/i3d_restoration.yaml training.steps=200
    """
    from medi3d.experiment.config import load_config
    from medi3d.experiment.run import Run
    from medi3d.training.train import run_training

    experiment = load_config(config, overrides or [])
    if experiment.task != "pretraining":
        raise ConfigError(f"{config}: task is {experiment.task!r}; `medi3d train` is for that")
    last = run_training(Run(runs / experiment.name, experiment), resume=resume)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(f"{last['artifact']}: sha256 {last['sha256']}, after {last['steps']} steps")
        write_json(json_file, last)


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="training, validation, or a split of the cohort's list.")] = (
        "validation"
    ),
    json_file: JsonFile = None,
) -> None:
    """Score the best network of a run case by case: cases.csv, pictures and report.html.

    For cross-validation, each case is scored by the fold that held it out; other splits by the ensemble.

    Example: medi3d evaluate runs/hippocampus_i3d
    """
    from medi3d.console import print_rows
    from medi3d.evaluation.evaluate import run_evaluation, summary
    from medi3d.experiment.run import Run
    from medi3d.training.crossvalidation import evaluate_folds

    opened = Run.open(run)
    if opened.experiment.is_crossvalidation:
        _show_folds(evaluate_folds(opened, split), split, json_file)
        return
    means = summary(run_evaluation(opened, split))
    print_rows(f"Mean over the {split} cases", [{"label": name, **row} for name, row in means.items()])
    write_json(json_file, means)


def _show_folds(table: list[dict[str, Any]], split: str, json_file: Path | None) -> None:
    from medi3d.console import print_rows
    from medi3d.training.crossvalidation import with_intervals

    if table:  # torchrun's other processes have none
        print_rows(f"All folds, {split}: mean over the cases (95 % interval)", with_intervals(table))
        write_json(json_file, table)


def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file, see configs/compare/.")],
    overrides: Overrides = None,
    executor: Annotated[str, typer.Option(help="Where to run the jobs: local or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, with local (default: as many as the cores allow).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue; finished runs are kept.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the comparison's folder.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Train every arm, seed and training-set size, and test each arm against its reference (paired).

    Example: medi3d compare configs/compare/hippocampus_small.yaml
    """
    from medi3d.cli.tables import print_effects
    from medi3d.comparison.compare import run_comparison
    from medi3d.comparison.config import load_comparison
    from medi3d.comparison.executor import create_executor

    comparison, resolve = load_comparison(config, overrides or [])
    folder = runs / comparison.name
    computed = create_executor(executor, workers, comparison.gpus)
    results = run_comparison(comparison, resolve, folder, computed, resume=resume)
    print_effects(results)
    typer.echo(f"{folder / 'report.html'}")
    effects, overall = ([f.row() for f in found] for found in (results.findings, results.overall))
    write_json(json_file, {"answer": results.answer, "effects": effects, "overall": overall})
    for cell, why in results.failed.items():
        typer.echo(f"medi3d: run {cell} failed: {why}", err=True)
    if results.failed:
        raise typer.Exit(1)
