"""Feature maps of clips and volumes at a layer of a network, written as npz files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from medi3d.datasets.clips.clips import Clip, load_clip
from medi3d.datasets.clips.frames import pictures_in
from medi3d.datasets.clips.lists import CLIP_SUFFIXES
from medi3d.datasets.clips.settings import STREAMS, ClipSettings
from medi3d.datasets.images.geometry import spacing_dhw
from medi3d.datasets.images.preprocessing import load_image
from medi3d.datasets.images.settings import Normalisation, VolumeSettings
from medi3d.engine import distributed
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError, DataError, SourceError
from medi3d.experiment.run import Run
from medi3d.files import writing, written_aside
from medi3d.models.artifact import load_artifact
from medi3d.models.encoders import create_encoder
from medi3d.models.end_points import end_point, features_at
from medi3d.models.networks import create_classifier
from medi3d.models.video import PUBLISHED, VIDEO
from medi3d.models.video.published_classifier import build_published_classifier, published_streams
from medi3d.prediction.predictor import Predictor
from medi3d.prediction.scans import find_scans


@dataclass(frozen=True)
class Extractor:
    """A network and how its inputs are read.

    Attributes:
        network: takes `(1, C, D, H, W)`, in evaluation mode.
        data: of clips or of volumes.
        names: of source and weights, or of the run, as recorded in each file.
    """

    network: nn.Module
    data: ClipSettings | VolumeSettings
    names: dict[str, str]

    @classmethod
    def of_run(cls, run: Run) -> "Extractor":
        """The best network of a run, in float32.

        Raises:
            ConfigError: the run neither classifies nor segments.
            WeightsError: it has no usable checkpoint.
        """
        experiment: Any = run.experiment
        if experiment.task == "pretraining":
            raise ConfigError(
                f"{run.folder}: is a run of task pretraining; give {run.encoder} with --network"
            )
        exact = replace(experiment, training=replace(experiment.training, precision="fp32"))
        predictor = Predictor.load(replace(run, experiment=exact))
        return cls(predictor.network, experiment.data, {"network": str(run.folder)})

    @classmethod
    def of_source(
        cls,
        source: str | None,
        weights: str | None,
        *,
        plan: str | None = None,
        clips: bool,
        window: tuple[float, float] | None = None,
    ) -> "Extractor":
        """A published classifier of clips (no source), an artifact, or a source that weights fill.

        Args:
            source: see `create_encoder`; a name of docs/video.md; None: the source of the weights' row.
            weights: a row, timm or file:PATH; an artifact brings its own.
            plan: kernels along depth; None: isotropic for volumes, video for clips.
            clips: whether clips are read, not volumes.
            window: lowest and highest value in HU; None: as MR, each volume by its percentiles.

        Raises:
            SourceError: neither is given, or the source is not an encoder.
            WeightsError: the weights are missing, or do not fit.
        """
        names = {"network": source or weights or "", "weights": weights or ""}
        if source is None:
            if weights is None:
                raise SourceError("no network given: name a run folder, an artifact, a source, or --weights")
            if not clips:
                raise SourceError(
                    f"weights {weights} mean a network for clips; for volumes name the source too"
                )
            network, _ = build_published_classifier(weights)
            return cls(network, ClipSettings(streams=published_streams(weights)), names)
        streams = _streams(weights)
        if source in VIDEO:
            facts = PUBLISHED[source]
            streams = "both" if facts.channels == STREAMS["both"] else streams
            channels = STREAMS[streams]
            network = create_classifier(source, num_classes=400, weights=weights, in_channels=channels)
            settings = ClipSettings(streams=streams, frames=facts.frames, crop=facts.size)
            return cls(network.eval(), settings, names)
        encoder: Any
        if source.endswith(".safetensors"):
            _refuse_for_artifact(source, weights=weights, plan=plan)
            encoder = load_artifact(source)
        else:
            encoder = create_encoder(
                source,
                weights=weights,
                plan=plan or ("video" if clips else "isotropic"),
                in_channels=STREAMS[streams] if clips else 1,
            )
        data: ClipSettings | VolumeSettings
        if clips:
            data = ClipSettings(streams=_streams_of(encoder.in_channels, source))
        else:
            data = _volumes(encoder.in_channels, window)
        return cls(encoder.eval(), data, names)

    def load(self, files: Sequence[Path]) -> tuple[Tensor, dict[str, Any]]:
        """One clip or volume as the network takes it, `(C, D, H, W)`, and further arrays to store.

        Raises:
            DataError: it is missing or damaged.
        """
        if isinstance(self.data, ClipSettings):
            return load_clip(Clip(files[0], 0, ""), self.data)["image"], {}
        image = load_image(files, self.data)
        return image.image, {"spacing": np.array(spacing_dhw(image.canonical))}

    def find(self, inputs: Sequence[Path], out: Path) -> dict[str, Sequence[Path]]:
        """Name -> files of each clip or volume; equal names are prefixed by their folder's."""
        if isinstance(self.data, VolumeSettings):
            scans = find_scans(inputs, out, self.data.channels, "same")
            return {scan.name: scan.images for scan in scans}
        paths = [path for given in inputs for path in _clips_in(given)]
        stems = [path.stem for path in paths]
        found: dict[str, Sequence[Path]] = {}
        for path, stem in zip(paths, stems, strict=True):
            name = stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}_{stem}"
            if name in found:
                raise ConfigError(f"{path}: another input is also written to {name}.npz; run them separately")
            found[name] = [path]
        return found


def are_clips(inputs: Sequence[Path]) -> bool:
    """Whether paths are clips, by their names, rather than volumes.

    Raises:
        ConfigError: they are mixed.
    """
    kinds = {path: _is_clip(path) or (path.is_dir() and bool(_clips_beside(path))) for path in inputs}
    if len(set(kinds.values())) > 1:
        clip = next(path for path, is_clip in kinds.items() if is_clip)
        volume = next(path for path, is_clip in kinds.items() if not is_clip)
        raise ConfigError(f"{clip} is a clip and {volume} is not; one network takes one kind")
    return all(kinds.values())


def write_features(
    extractor: Extractor, inputs: Sequence[Path], out: Path, at: str, *, pooled: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write NAME.npz for each input: "features" float32, "input_shape", "end_point", "network", "weights".

    Features are `(C, D', H', W')`, or pooled over D', H' and W' `(C,)`: activations, without a unit.
    Positions lie `input_shape / (D', H', W')` voxels apart; for volumes, "spacing" (D, H, W) is
    the voxel size in mm.

    Args:
        extractor: the network.
        inputs: files, or folders of them.
        out: the folder.
        at: see `end_point`.
        pooled: store means over D', H' and W' only.

    Returns:
        A row for each file (input, path, shape), and a line for each input that could not be read.

    Raises:
        SourceError: the network has no such end point.
        DataError: `out` cannot be written.
    """
    network = extractor.network
    place = end_point(network, at)
    precision = Precision.choose("fp32", distributed.local_device())
    precision.place_network(network)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name, files in extractor.find(inputs, out).items():
        try:
            image, more = extractor.load(files)
            maps = features_at(network, place, precision.place(image[None]))[0].float().cpu()
        except DataError as error:
            failed.append(str(error))
            continue
        if pooled:
            maps = maps.flatten(1).mean(dim=1) if maps.dim() > 1 else maps
        content = {"features": maps.numpy(), "input_shape": np.array(image.shape), "end_point": at} | more
        rows.append(
            {"input": str(files[0]), "path": str(_write(out / f"{name}.npz", content | extractor.names))}
        )
        rows[-1]["shape"] = tuple(maps.shape)
    return rows, failed


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in CLIP_SUFFIXES or (path.is_dir() and bool(pictures_in(path)))


def _clips_beside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_clip(path))


def _clips_in(given: Path) -> list[Path]:
    """The clips in a folder of clips; any other path unchanged."""
    return _clips_beside(given) or [given] if given.is_dir() and not _is_clip(given) else [given]


def _streams(weights: str | None) -> str:
    """The streams that the row of the weights takes; RGB if it does not say."""
    return (
        "rgb"
        if weights in (None, "timm") or str(weights).startswith("file:")
        else published_streams(str(weights))
    )


def _streams_of(channels: int, source: str) -> str:
    found = [name for name, count in STREAMS.items() if count == channels]
    if not found:
        raise SourceError(f"{source} takes {channels} channel(s): clips have 3 (RGB), 2 (flow) or 5 (both)")
    return found[0]


def _refuse_for_artifact(artifact: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise SourceError(f"the artifact {artifact} has its own weights and plan: leave out --{option}")


def _volumes(channels: int, window: tuple[float, float] | None) -> VolumeSettings:
    how = Normalisation() if window is None else Normalisation("window", window=list(window))
    modality = "MR" if window is None else "CT"
    return VolumeSettings("", modality, {"any": 1}, channels=channels, normalisation=how)


def _write(path: Path, content: dict[str, Any]) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **content)
    return path
