"""What a network makes of clips and volumes at one of its layers, kept as npz files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medi3d.datasets.clip_lists import CLIP_SUFFIXES
from medi3d.datasets.clips import STREAMS, Clip, ClipSettings, load_clip
from medi3d.datasets.frames import pictures_in
from medi3d.datasets.geometry import spacing_dhw
from medi3d.datasets.volumes import Normalisation, VolumeSettings, load_image
from medi3d.engine import distributed
from medi3d.engine.precision import Precision
from medi3d.errors import ConfigError, DataError, ShapeError, SourceError
from medi3d.files import written_aside
from medi3d.inflation.network import Inflated
from medi3d.models.artifact import load_artifact
from medi3d.models.classify import build_published_classifier, published_streams
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import create_classifier
from medi3d.models.video import PUBLISHED, VIDEO
from medi3d.transfer.experiment import ClassificationExperiment, Experiment, SegmentationExperiment
from medi3d.transfer.inputs import find_scans
from medi3d.transfer.predictor import Predictor

NEAR = 8
"""Names that are listed for an unknown end point."""

ANOTHER = "name another layer, or level1, level2, ..."


@dataclass(frozen=True)
class Extractor:
    """A network and how its inputs are read.

    Attributes:
        network: takes `(1, C, D, H, W)`, in evaluation mode.
        data: of clips or of volumes.
        names: of source and weights, or of the run, as they are noted in each file.
    """

    network: nn.Module
    data: ClipSettings | VolumeSettings
    names: dict[str, str]

    @classmethod
    def of_run(cls, experiment: Experiment, folder: Path) -> "Extractor":
        """The best network of a run, in float32.

        Raises:
            ConfigError: the run neither classifies nor segments.
            WeightsError: it has no usable checkpoint.
        """
        if not isinstance(experiment, ClassificationExperiment | SegmentationExperiment):
            raise ConfigError(
                f"{folder}: is a run of task {experiment.task}; give its encoder.safetensors with --network"
            )
        exact = replace(experiment, training=replace(experiment.training, precision="fp32"))
        return cls(Predictor.load(exact, folder).network, experiment.data, {"network": str(folder)})

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
            source: see `create_encoder`; a name of docs/video.md; None: what the weights' row is of.
            weights: a row, timm or file:PATH; an artifact brings its own.
            plan: kernels along depth; None: isotropic for volumes, video for clips.
            clips: whether clips are read, not volumes.
            window: lowest and highest value in HU; None: as MR, each volume by its percentiles.

        Raises:
            SourceError: neither is given, or the source is no encoder.
            WeightsError: the weights are missing, or do not fit.
        """
        names = {"network": source or weights or "", "weights": weights or ""}
        if source is None:
            if weights is None:
                raise SourceError("which network? give a run folder, an artifact or a source, or --weights")
            if not clips:
                raise SourceError(
                    f"weights {weights} alone are a network for clips; for volumes name its source too"
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
        """One clip or volume as the network takes it, `(C, D, H, W)`, and what else is to be kept of it.

        Raises:
            DataError: it is missing or damaged.
        """
        if isinstance(self.data, ClipSettings):
            return load_clip(Clip(files[0], 0, ""), self.data)["image"], {}
        image = load_image(files, self.data)
        return image.image, {"spacing": np.array(spacing_dhw(image.canonical))}

    def find(self, inputs: Sequence[Path], out: Path) -> dict[str, Sequence[Path]]:
        """Name -> files of each clip or volume that paths mean; equal names get their folder's in front."""
        if isinstance(self.data, VolumeSettings):
            scans = find_scans(inputs, out, self.data.channels, "same")
            return {scan.name: scan.images for scan in scans}
        paths = [path for given in inputs for path in _clips_in(given)]
        stems = [path.stem for path in paths]
        found: dict[str, Sequence[Path]] = {}
        for path, stem in zip(paths, stems, strict=True):
            name = stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}_{stem}"
            if name in found:
                raise ConfigError(
                    f"{path}: another input would be written to {name}.npz too; take them apart"
                )
            found[name] = [path]
        return found


def are_clips(inputs: Sequence[Path]) -> bool:
    """Whether paths are clips by their names, as against volumes.

    Raises:
        ConfigError: some are and some are not.
    """
    kinds = {path: _is_clip(path) or (path.is_dir() and bool(_clips_beside(path))) for path in inputs}
    if len(set(kinds.values())) > 1:
        clip = next(path for path, is_clip in kinds.items() if is_clip)
        volume = next(path for path, is_clip in kinds.items() if not is_clip)
        raise ConfigError(f"{clip} is a clip and {volume} is none; one network takes one kind at a time")
    return all(kinds.values())


def write_features(
    extractor: Extractor, inputs: Sequence[Path], out: Path, at: str, *, pooled: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write NAME.npz for each input: "features" float32, "input_shape", "end_point", "network", "weights".

    Features are `(C, D', H', W')`, or pooled over D', H' and W' `(C,)`: activations, without a unit.
    Positions lie `input_shape / (D', H', W')` voxels apart; of a volume "spacing" (D, H, W) gives the
    voxels' sides in mm.

    Args:
        extractor: the network.
        inputs: files, or folders of them.
        out: the folder.
        at: see `end_point`.
        pooled: whether to keep means alone.

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


@dataclass(frozen=True)
class EndPoint:
    """Where features are taken: what a module gives, or of an encoder's list of maps the one at `level`."""

    path: str
    level: int | None = None


def end_point(network: nn.Module, name: str) -> EndPoint:
    """The end point of that name: a layer by its path, or the end of it (`Mixed_5c`); or `level1`, ...

    Levels are the maps that an encoder gives, fine to coarse. Of several layers the outermost one is meant.

    Raises:
        SourceError: there is none (near ones are listed), or there are several at the same depth.
    """
    levels = {f"level{k + 1}": EndPoint(_path_of_encoder(network), k) for k in range(_levels(network))}
    if name in levels:
        return levels[name]
    paths = [path for path, _ in network.named_modules() if path]
    hits = [path for path in paths if path == name or path.endswith(f".{name}")]
    if not hits:
        near = _near(name, paths, list(levels))
        raise SourceError(f"no end point {name!r}; near: {', '.join(near)}")
    outermost = min(path.count(".") for path in hits)
    hits = [path for path in hits if path.count(".") == outermost]
    if len(hits) > 1:
        raise SourceError(f"the end point {name!r} is there {len(hits)} times: say {' or '.join(hits[:4])}")
    return EndPoint(hits[0])


@torch.inference_mode()
def features_at(network: nn.Module, place: EndPoint, image: Tensor) -> Tensor:
    """What `place` gives for one clip or volume `(1, C, D, H, W)`: `(1, C', D', H', W')`, or vectors.

    Vectors are `(1, C', D')`, or `(1, C')` where depth is gone. Of a network that looks at windows of time,
    what they give follows one after another along D'.

    Raises:
        ShapeError: the layer gives no map of the image, or is used several times.
    """
    given: list[Tensor] = []
    turns: list[None] = []
    layer, owner = network.get_submodule(place.path), _owner(network, place.path)
    fold = owner.fold if isinstance(owner, Inflated) and layer is not owner else None

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        output = output if place.level is None else output[place.level]
        if not isinstance(output, Tensor) or output.dim() not in ((2, 4) if fold else (2, 5)):
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"{place.path or 'the network'} gives {kind}: no map; {ANOTHER}")
        maps = fold.unfold(output) if fold else output
        if maps.dim() == 5 and not _is_map_of(image, maps):
            raise ShapeError(
                f"{place.path} gives {tuple(maps.shape)} for {tuple(image.shape)}: height and width are not "
                f"its last axes; {ANOTHER}"
            )
        given.append(maps.clone())  # the layers behind may change it in place

    hooks = [layer.register_forward_hook(keep)]
    if owner is not None:
        hooks.append(owner.register_forward_hook(lambda *_: turns.append(None)))
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not given or len(given) > max(1, len(turns)):
        raise ShapeError(f"{place.path} runs {len(given)} times in one forward; {ANOTHER}")
    if len(given) == 1:
        return given[0]
    return torch.cat([maps.unsqueeze(2) if maps.dim() == 2 else maps for maps in given], dim=2)


def _is_map_of(image: Tensor, maps: Tensor) -> bool:
    """Whether height and width are the image's, divided by one stride and rounded."""
    (height, width), (rows, columns) = image.shape[3:], maps.shape[3:]
    return abs(rows * width - columns * height) <= 2 * max(height, width)


def _owner(network: nn.Module, path: str) -> nn.Module | None:
    """The inflated network that a layer is part of, itself included; of other layers the encoder, if any."""
    parts = path.split(".")
    around = [network.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]
    inflated = next((module for module in around if isinstance(module, Inflated)), None)
    if inflated is not None:
        return inflated
    encoder = getattr(network, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and not isinstance(encoder, nn.ModuleList) else None


def _path_of_encoder(network: nn.Module) -> str:
    return "encoder" if hasattr(network, "encoder") else ""


def _levels(network: nn.Module) -> int:
    encoder: Any = getattr(network, "encoder", network)
    channels = getattr(encoder, "out_channels", ())
    is_list = not isinstance(encoder, Inflated) or not hasattr(encoder.network, "Logits")
    return len(channels) if is_list else 0


def _near(name: str, paths: Sequence[str], levels: list[str]) -> list[str]:
    """Names like it; else the levels and the layers at the top of the (inflated) network."""
    last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    near = get_close_matches(name, [*levels, *last], NEAR, 0.5) or get_close_matches(name, paths, NEAR, 0.5)
    tops = [path.rpartition("network.")[2] for path in paths if "network." in path]
    return near or [*levels, *(top for top in tops if "." not in top)] or list(paths[:NEAR])


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in CLIP_SUFFIXES or (path.is_dir() and bool(pictures_in(path)))


def _clips_beside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_clip(path))


def _clips_in(given: Path) -> list[Path]:
    """A folder of clips as these clips; a clip, and whatever else it is, as it is."""
    return _clips_beside(given) or [given] if given.is_dir() and not _is_clip(given) else [given]


def _streams(weights: str | None) -> str:
    """Of clips for weights by their row; pictures where they do not say."""
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path
