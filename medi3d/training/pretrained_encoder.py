"""The result of a pretraining: an encoder as an artifact with its provenance, case by case."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medi3d.datasets.cohorts.cohort import Case
from medi3d.datasets.cohorts.unlabelled import Volume, file_fingerprint
from medi3d.datasets.sampling.stream import collate, seeded
from medi3d.engine import distributed
from medi3d.engine.log import log
from medi3d.engine.precision import Precision
from medi3d.engine.state import fill_network, read_checkpoint
from medi3d.errors import DataError, WeightsError
from medi3d.experiment.pretext_samples import PretextSamples
from medi3d.experiment.run import Run
from medi3d.experiment.settings import Experiment, PretrainingExperiment
from medi3d.experiment.tasks import build_network, build_task
from medi3d.files import file_sha256, read_table
from medi3d.inflation.network import Inflated, prove
from medi3d.models.artifact import collapse, read_description, save_artifact
from medi3d.reports.plots import plot_pretext
from medi3d.reports.run_report import write_report
from medi3d.training.domain_shift import recalibrate

RECALIBRATION = 64
"""Number of patches for calibrating the batch norms of the kept encoder."""


def keep_encoder(run: Run) -> dict[str, Any]:
    """Write the best encoder of a pretraining as `encoder.safetensors`, with pictures and a report.

    Its batch norms are recalibrated on undamaged patches, which are what it will see. Its provenance holds
    the pretext, the steps, the seed, the score, what it started from, and the name and SHA-256 of every file
    that it was trained on.

    Returns:
        "artifact", "sha256", "steps", and the score under its name.

    Raises:
        WeightsError: the run has no usable checkpoint, or the artifact cannot be written.
    """
    experiment: Any = run.experiment
    task = build_task(experiment)
    content = read_checkpoint(run.best)
    network: Any = build_network(experiment, task, pretrained=False, checkpoint=content)
    facts = fill_network(network, content, run.best)
    precision = Precision.choose(experiment.training.precision, distributed.local_device())
    precision.place_network(network).eval()
    samples = PretextSamples(experiment)
    training, validation = samples.split()
    _draw(network, samples, validation, precision, run.plots / "pretext.png")
    encoder: Inflated = network.encoder
    recalibrate(encoder, _patches(samples, training), precision)
    encoder.cpu()
    origin = encoder.report
    prove(collapse(encoder, origin.source), encoder, size=origin.exactness.size)
    encoder.report.source = origin.source
    encoder.report.weights = {
        "name": f"pretraining/{experiment.name}",
        "contract": origin.weights.get("contract"),
        "licences": origin.weights.get("licences", []),
        "pretraining": {
            "pretext": asdict(experiment.pretext),
            "steps": facts["step"],
            "seed": experiment.seed,
            task.score: facts["score"],
            "cpu_seconds": read_table(run.metrics)[-1]["cpu_seconds"],
            "started_from": _started_from(experiment),
            "cases": _fingerprints(training),
        },
    }
    path = save_artifact(encoder, run.encoder)
    summary = {
        "artifact": str(path),
        "sha256": file_sha256(path),
        "steps": facts["step"],
        task.score: facts["score"],
    }
    report = write_report(run, {"Encoder": [summary]})
    log.info(f"encoder: {path}")
    log.info(f"report: {report}")
    return summary


def _patches(samples: PretextSamples, volumes: Sequence[Volume]) -> Iterator[Tensor]:
    """Undamaged training patches in pairs, `(2, C, D, H, W)`; deterministic."""
    chosen = [volumes[i * len(volumes) // RECALIBRATION] for i in range(RECALIBRATION)]
    for first in range(0, RECALIBRATION, 2):
        pair = []
        for number, volume in enumerate(chosen[first : first + 2], first):
            with seeded(samples.seed, number):
                pair.append(samples.undamaged(samples.load(volume)))
        yield collate(pair)["image"]


def _started_from(experiment: PretrainingExperiment) -> dict[str, Any]:
    """Source and weights of the first step, with the provenance of an artifact."""
    network = experiment.network
    start: dict[str, Any] = {"source": network.source, "weights": network.weights}
    path = artifact_of(experiment)
    if path is not None:
        start["pretraining"] = _provenance(path)
    return start


def _fingerprints(volumes: Sequence[Volume]) -> list[dict[str, Any]]:
    files = {volume.name: volume.files for volume in volumes}
    return [{"name": name, "sha256": [file_fingerprint(f) for f in part]} for name, part in files.items()]


@torch.no_grad()
def _draw(
    network: nn.Module, samples: PretextSamples, volumes: Sequence[Volume], precision: Precision, path: Path
) -> None:
    """Input, answer and target for a few validation volumes."""
    rows = []
    for volume in volumes[:4]:
        sample = samples.whole(samples.load(volume))
        with precision.autocast():
            answer = network(precision.place(sample["image"][None]))[0].float().cpu()
        answer = answer.argmax(dim=0) if samples.maps else answer[0]
        rows.append((sample["image"][0].numpy(), answer.numpy(), sample["label"][0].numpy()))
    plot_pretext(rows, path)


def artifact_of(experiment: Experiment) -> Path | None:
    """The artifact that a network starts from, by `network.source` or `network.weights`; None: none."""
    for name in (experiment.network.source, str(experiment.network.weights).removeprefix("file:")):
        if name.endswith(".safetensors") and Path(name).is_file():
            return Path(name)
    return None


def check_unseen(experiment: Experiment, cases: Sequence[Case]) -> None:
    """Refuse to score a network on cases that its encoder was pretrained on.

    Raises:
        DataError: the artifact that it starts from, or one before that, has seen one of `cases`.
    """
    path = artifact_of(experiment)
    if path is None or experiment.strategy == "original":
        return
    seen: dict[str, str] = {}
    provenance = _provenance(path)
    while provenance:
        seen |= {sha: row["name"] for row in provenance["cases"] for sha in row["sha256"]}
        provenance = provenance["started_from"].get("pretraining")
    for case in cases if seen else ():
        for image in case.images:
            if file_fingerprint(image) in seen:
                raise DataError(
                    f"{image}: {path} was pretrained on this validation case; pretrain without it "
                    "(data.cohorts: exclude_validation_of)"
                )


def _provenance(path: Path) -> dict[str, Any] | None:
    try:
        return read_description(path)["weights"].get("pretraining")
    except WeightsError:  # not an artifact: reading it as weights will say what is wrong
        return None
