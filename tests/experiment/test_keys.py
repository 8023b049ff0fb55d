"""Every key of every config section changes what it configures; a new key brings its entry in `KEYS`."""

import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from medi3d import cli
from medi3d.datasets.sampling.stream import seeded
from medi3d.engine.budget import Budget
from medi3d.engine.clock import Clock
from medi3d.engine.precision import Precision
from medi3d.engine.state import TrainingState
from medi3d.errors import ConfigError, DataError
from medi3d.experiment.config import load_config
from medi3d.experiment.settings import TASKS
from medi3d.experiment.strategies import frozen_parts
from medi3d.experiment.tasks import build_data, build_network, build_task
from medi3d.inflation.checkpointing import CheckpointedBlock
from medi3d.models.artifact import save_artifact
from medi3d.models.encoders import create_encoder
from medi3d.models.segmenter import Segmenter
from tests.keys import Change, changed_keys, facts, keys_of
from tests.tiny import CLIPS_CONFIG, CONFIG, kill, with_handler, write_cohort

PRETRAINING = """
task: pretraining
name: pre
data: {{cohorts: [{{root: {root}}}], patch: [16, 16, 16], validation: 1}}
pretext: {{kind: masked, labels: {{low: [1], high: [2]}}, cube: 4}}
network: {{source: "timm:test_resnet", levels: 3}}
"""

STILL = [f"augmentation.{key}=0" for key in ("affine", "flip", "gamma", "noise")] + ["data.foreground=0"]
STEPS = ["training.steps=10"]
RESNET = ["network.source=timm:test_resnet", "network.levels=3"]
TUNED = ["network.source={artifact}", "strategy=full"]
SMALL = ["prediction.window=[8,8,8]"]
RESTORED = ["pretext.kind=restoration", *(f"pretext.{key}=0" for key in ("shuffle", "bend", "paint"))]


class Bench:
    """A config under test: the experiment that it is, and what comes of it."""

    def __init__(self, places: dict[str, Path], folder: Path, change: Change, overrides, monkeypatch):
        self.places, self.folder, self.monkeypatch = places, folder, monkeypatch
        folder.mkdir()
        text = {"segmentation": CONFIG, "classification": CLIPS_CONFIG, "pretraining": PRETRAINING}
        root = places["clips" if change.task == "classification" else "cohort"]
        self.config = folder / "config.yaml"
        self.config.write_text(text[change.task].format(root=root))
        self.overrides = [one.format(**places, out=folder.parent) for one in (*change.base, *overrides)]
        self.pretrains = change.task == "pretraining"

    @property
    def experiment(self):
        return load_config(self.config, self.overrides)

    @property
    def data(self):
        return build_data(self.experiment)

    def medi3d(self, *arguments):
        self.monkeypatch.setattr(sys, "argv", ["medi3d", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    def step(self, count=1):
        """The trainer after so many steps of a training that ends there."""
        seen = []

        def look(trainer):
            seen.append(trainer)
            if trainer.state.iteration == count:
                kill(trainer)

        with self.monkeypatch.context() as patch:
            with_handler(patch, Events.ITERATION_COMPLETED, look)
            assert self.medi3d("train", self.config, *self.overrides, "--runs", self.folder / "runs") == 130
        return seen[-1]

    def copied_run(self):
        """The finished run, with this config's section `prediction`."""
        copy = self.folder / "run"
        shutil.copytree(self.places["run"], copy)
        given = self.experiment.prediction
        lines = (copy / "config.yaml").read_text().split("prediction:\n")[0]
        section = {key: getattr(given, key) for key in ("window", "overlap", "mirror", "tolerance")}
        words = {key: "null" if value is None else value for key, value in section.items()}
        rest = (copy / "config.yaml").read_text().split("prediction:\n")[1]
        after = rest[rest.index("\ndata:") + 1 :] if "\ndata:" in rest else ""
        body = "".join(f"  {key}: {value}\n" for key, value in words.items())
        (copy / "config.yaml").write_text(f"{lines}prediction:\n{body}{after}")
        return copy


@pytest.fixture(scope="module")
def places(cohort, clips, tmp_path_factory) -> dict[str, Path]:
    """Folders and files that configs name."""
    root = tmp_path_factory.mktemp("places")
    made = {"cohort": cohort, "clips": clips, "root": root, "other": write_cohort(root / "other", 5)}
    torch.manual_seed(0)
    made["artifact"] = save_artifact(create_encoder("timm:test_resnet", levels=3), root / "e.safetensors")
    made["config"] = root / "run.yaml"
    made["config"].write_text(CONFIG.format(root=cohort))
    made["run"] = root / "runs" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        command = ["train", made["config"], "training.steps=1", "--runs", root / "runs"]
        patch.setattr(sys, "argv", ["medi3d", *map(str, command)])
        with pytest.raises(SystemExit):
            cli.main()
    image = cohort / "imagesTr" / "case_0.nii.gz"
    zeros, ones = (np.full(nib.load(image).shape, value, np.uint8) for value in (0, 1))
    for name, mask in (("zeros", zeros), ("low", ones), ("high", ones)):
        nib.save(nib.Nifti1Image(mask, nib.load(image).affine), root / f"{name}.nii.gz")
    made["empty"], made["overlapping"] = root / "empty.csv", root / "overlapping.csv"
    made["empty"].write_text(f"image,label\n{image},zeros.nii.gz\n")
    made["overlapping"].write_text(f"image,label:low,label:high\n{image},low.nii.gz,high.nii.gz\n")
    values = np.random.default_rng(0).normal(size=zeros.shape).astype(np.float32)
    values[:, :, 4:] = 0  # more than half of it is background
    holed = np.where(np.arange(zeros.shape[2]) > 9, np.nan, values).astype(np.float32)
    for name, array in (("sparse", values), ("holed", holed), ("blank", np.ones_like(values))):
        nib.save(nib.Nifti1Image(array, nib.load(image).affine), root / f"{name}.nii.gz")
        made[name] = root / f"{name}.csv"
        made[name].write_text(f"image,label\n{name}.nii.gz,low.nii.gz\n")
    made["listed"], made["broken"] = root / "list.csv", root / "broken"
    paths = sorted(path.relative_to(clips) for path in clips.rglob("*.mp4"))
    made["listed"].write_text("path,class\n" + "".join(f"{path},{path.parent}\n" for path in paths))
    shutil.copytree(clips, made["broken"])
    (made["broken"] / "above" / "v_above_g09_c01.mp4").write_bytes(b"no clip")
    return made


@pytest.fixture(scope="module")
def seen() -> dict:
    """What was seen of a config without a change, as many keys share one."""
    return {}


def accepted(bench):
    try:
        return bool(bench.experiment)
    except ConfigError:
        return False


def names(bench):
    try:
        data = bench.data
        return [[item.name for item in part] for part in (data.training, data.validation)]
    except DataError as error:
        return str(error)


def files(bench):
    data = bench.data
    return [str(item) for item in data.training]


def loaded(bench):
    data = bench.data
    try:
        return facts(data.load(data.training[0])["image"].float())
    except DataError as error:
        return str(error)


def cached(bench):
    loaded(bench)
    return sorted(path.name for path in (bench.folder.parent / "kept").rglob("*.*"))


def drawn(bench, count=4):
    """What some training samples look like."""
    data = bench.data
    read = data.load(data.training[0])
    with seeded(3):
        samples = [data.change(read) for _ in range(count)]
    return [facts(torch.as_tensor(one[key]).float()) for one in samples for key in ("image", "label")]


def network(bench):
    experiment = bench.experiment
    built = build_network(experiment, build_task(experiment))
    kinds = [type(module).__name__ for module in built.modules()]
    return kinds, {name: facts(p) for name, p in built.named_parameters()}


def contract(bench):
    experiment = bench.experiment
    built = build_network(experiment, build_task(experiment), pretrained=False)
    return built.encoder.normaliser is None


def outputs(bench):
    experiment = bench.experiment
    found = build_network(experiment, build_task(experiment)).train()(torch.randn(2, 1, 16, 16, 16))
    return isinstance(found, torch.Tensor)


def dropout(bench):
    experiment = bench.experiment
    built = build_network(experiment, build_task(experiment))
    return [module.p for module in built.modules() if isinstance(module, nn.Dropout)]


def frozen(bench):
    experiment = bench.experiment
    return len(frozen_parts(build_network(experiment, build_task(experiment)), experiment.strategy))


def classes(bench):
    return build_task(bench.experiment).classes


def optimised(bench):
    optimizer = bench.step().optimizer
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return type(optimizer).__name__, groups


def stepped(bench):
    return {name: facts(p) for name, p in bench.step(2).network.named_parameters()}


def thawed(bench):
    trained = bench.step().network.encoder
    norms = [m.training for m in trained.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [p.requires_grad for p in trained.parameters()], norms


def drift(bench):
    bench.step()
    return (bench.folder / "runs" / "tiny" / "drift.csv").read_text()


def run_folders(bench):
    bench.step()
    return sorted(path.name for path in (bench.folder / "runs").iterdir())


def validated(bench):
    bench.step(2)
    return (bench.folder / "runs" / "tiny" / "metrics.csv").exists()


class Spent(Clock):
    """Five seconds of training are over."""

    def read(self):
        return {"training_cpu_seconds": 5.0, "training_wall_seconds": 5.0}


def ended(bench):
    return Budget(bench.experiment.training, Spent()).is_over(5)


def flat(bench):
    budget = Budget(bench.experiment.training, Clock())
    budget.note_scores(3, [0.5, 0.501, 0.502])
    return budget.flat_at


def checkpointed(bench):
    network = bench.step().network
    return sum(isinstance(module, CheckpointedBlock) for module in network.modules())


def averaged(bench):
    network = nn.Linear(1, 1)
    groups = [{"name": "rest", "params": list(network.parameters()), "lr": 0.1}]
    state = TrainingState.create(network, groups, bench.experiment.training)
    return state.validated is state.network


def precision(bench):
    return str(Precision.choose(bench.experiment.training.precision, torch.device("cpu")))


def batches(bench):
    experiment = bench.experiment
    loader = bench.data.training_batches(0, experiment.training, experiment.seed)
    return loader.num_workers, next(iter(loader))["image"].shape if not loader.num_workers else None


def readings(bench):
    """How often each case is read for six samples."""
    read, data, experiment = Counter(), bench.data, bench.experiment

    def load(item):
        read[item.name] += 1
        return data.load(item)

    counted = replace(data, training=data.training[:2], load=load)
    list(islice(counted.training_batches(0, experiment.training, 0), 3))
    return read


def windows(bench):
    """Shapes of what the network sees of a scan."""
    seen, forward, run = [], Segmenter.forward, bench.copied_run()
    with bench.monkeypatch.context() as patch:
        patch.setattr(Segmenter, "forward", lambda self, x: seen.append(tuple(x.shape)) or forward(self, x))
        scan = bench.places["cohort"] / "imagesTr" / "case_0.nii.gz"
        assert bench.medi3d("predict", run, scan, "--out", bench.folder / "masks") == 0
    return seen


def surfaces(bench):
    run = bench.copied_run()
    assert bench.medi3d("evaluate", run) == 0
    rows = [line.split(",") for line in (run / "cases.csv").read_text().splitlines()]
    return [row[rows[0].index("surface_dice")] for row in rows]


def augmented(key, value, *base):
    return Change(f"augmentation.{key}={value}", drawn, [*STILL, *base])


def clip(override, look, *base):
    return Change(override, look, base, "classification")


def pre(override, look, *base):
    return Change(override, look, base, "pretraining")


def of_cohort(fact, look):
    return pre(f"data.cohorts=[{{{{root: {{cohort}}, {fact}}}}}]", look)


KEYS = {
    "Experiment.task": Change("task=pretraining", accepted),
    "Experiment.name": Change("name=another", run_folders),
    "Experiment.seed": Change("seed=1", network),
    "Experiment.strategy": Change("strategy=fixed", frozen, TUNED),
    "NetworkSettings.source": Change("network.source=timm:test_resnet", network, ["network.levels=3"]),
    "NetworkSettings.weights": Change("network.weights=file:{artifact}", network, [*RESNET, "strategy=full"]),
    "NetworkSettings.plan": Change("network.plan=planar", network, RESNET),
    "NetworkSettings.profile": Change("network.profile=centre", network, RESNET),
    "NetworkSettings.in_channels": Change("network.in_channels=2", network, RESNET),
    "NetworkSettings.contract": Change(
        "network.contract=false", contract, [*RESNET, "network.weights=timm", "strategy=full"]
    ),
    "NetworkSettings.levels": Change("network.levels=2", network, ["network.source=timm:test_resnet"]),
    "NetworkSettings.decoder_channels": Change("network.decoder_channels=[8,8,8]", network, RESNET),
    "NetworkSettings.norm": Change("network.norm=group", network, RESNET),
    "NetworkSettings.head": Change("network.head=subpixel", network, RESNET),
    "NetworkSettings.deep_supervision": Change("network.deep_supervision=true", outputs, RESNET),
    "NetworkSettings.dropout": clip("network.dropout=0.25", dropout),
    "TrainingSettings.steps": Change("training.steps=10", ended),
    "TrainingSettings.cpu_seconds": Change("training.cpu_seconds=1", ended, STEPS),
    "TrainingSettings.gpu_seconds": Change("training.gpu_seconds=1", ended, STEPS),
    "TrainingSettings.batch_size": Change("training.batch_size=1", batches),
    "TrainingSettings.learning_rate": Change("training.learning_rate=0.5", optimised, RESNET),
    "TrainingSettings.encoder_factor": Change("training.encoder_factor=0.7", optimised, RESNET),
    "TrainingSettings.optimizer": Change("training.optimizer=sgd", optimised),
    "TrainingSettings.weight_decay": Change("training.weight_decay=0.3", optimised),
    "TrainingSettings.warmup": Change("training.warmup=0.5", optimised, STEPS),
    "TrainingSettings.schedule": Change("training.schedule=poly", optimised, [*STEPS, "training.warmup=0"]),
    "TrainingSettings.drops": Change("training.drops=[0.1]", optimised, [*STEPS, "training.schedule=step"]),
    "TrainingSettings.patience": Change(
        "training.patience=2", flat, ["training.schedule=plateau", "training.steps=50"]
    ),
    "TrainingSettings.min_gain": Change(
        "training.min_gain=0.0001",
        flat,
        ["training.schedule=plateau", "training.steps=50", "training.patience=1"],
    ),
    "TrainingSettings.gradient_clip": Change(
        "training.gradient_clip=0.001", stepped, ["training.optimizer=sgd"]
    ),
    "TrainingSettings.ema": Change("training.ema=0.9", averaged),
    "TrainingSettings.precision": Change("training.precision=bf16", precision),
    "TrainingSettings.validate_every": Change("training.validate_every=1", validated),
    "TrainingSettings.checkpoint_activations": Change(
        "training.checkpoint_activations=true", checkpointed, RESNET
    ),
    "TrainingSettings.workers": Change("training.workers=1", batches),
    "TrainingSettings.cache_gb": Change("training.cache_gb=0", readings),
    "TuningSettings.batchnorm": Change("tuning.batchnorm=freeze", thawed, TUNED),
    "TuningSettings.unfreeze": Change("tuning.unfreeze=0.5", thawed, TUNED),
    "TuningSettings.l2_sp": Change("tuning.l2_sp=0.5", stepped, TUNED),
    "TuningSettings.drift_samples": Change("tuning.drift_samples=2", drift, TUNED),
    "PredictionSettings.window": Change("prediction.window=[8,8,8]", windows),
    "PredictionSettings.overlap": Change("prediction.overlap=0", windows, SMALL),
    "PredictionSettings.mirror": Change("prediction.mirror=[depth]", windows),
    "PredictionSettings.tolerance": Change("prediction.tolerance=5", surfaces),
    "VolumeSettings.root": Change("data.root={other}", names),
    "VolumeSettings.modality": Change("data.modality=CT", accepted),
    "VolumeSettings.labels": Change("data.labels={{low: 2, high: 1}}", classes),
    "VolumeSettings.channels": Change("data.channels=2", loaded),
    "VolumeSettings.spacing": Change("data.spacing=[2,2,2]", loaded),
    "VolumeSettings.patch": Change("data.patch=[8,8,8]", drawn, STILL),
    "VolumeSettings.foreground": Change("data.foreground=1", drawn, [*STILL, "data.patch=[4,4,4]"]),
    "VolumeSettings.validation": Change("data.validation=2", names),
    "VolumeSettings.split_seed": Change("data.split_seed=1", names),
    "VolumeSettings.symmetric": Change(
        "data.symmetric=[[low,high]]",
        drawn,
        [*STILL, "augmentation.flip=1", "augmentation.flip_axes=[left-right]"],
    ),
    "VolumeSettings.empty_labels": Change(
        "data.empty_labels=true", loaded, ["data.root={empty}", "data.validation=0"]
    ),
    "VolumeSettings.cache": Change("data.cache={out}/kept", cached),
    "VolumeSettings.overlaps": Change(
        "data.overlaps=[low,high]", loaded, ["data.root={overlapping}", "data.validation=0"]
    ),
    "VolumeSettings.folds": Change("data.folds=4", names),
    "VolumeSettings.fold": Change("data.fold=1", names, ["data.folds=4"]),
    "VolumeSettings.by_channel": Change(
        "data.by_channel=[{{name: a, modality: MR, normalisation: {{method: zscore}}}}]", loaded
    ),
    "VolumeSettings.nan": Change("data.nan=background", loaded, ["data.root={holed}", "data.validation=0"]),
    "VolumeSettings.missing_channels": Change(
        "data.missing_channels=zeros", loaded, ["data.root={blank}", "data.validation=0"]
    ),
    "ChannelSettings.name": Change(
        "data.by_channel=[{{name: b, modality: MR}}]",
        lambda bench: bench.experiment.data.name_of(0),
        ["data.by_channel=[{{name: a, modality: MR}}]"],
    ),
    "ChannelSettings.modality": Change(
        "data.by_channel=[{{name: a, modality: CT}}]",
        accepted,
        ["data.by_channel=[{{name: a, modality: MR}}]"],
    ),
    "Normalisation.background": Change(
        "data.normalisation.background=ignored", loaded, ["data.root={sparse}", "data.validation=0"]
    ),
    "Normalisation.method": Change("data.normalisation.method=zscore", loaded),
    "Normalisation.percentiles": Change("data.normalisation.percentiles=[10,90]", loaded),
    "Normalisation.window": Change(
        "data.normalisation.window=[0,1]",
        loaded,
        ["data.modality=CT", "data.normalisation={{method: window, window: [-1, 5]}}"],
    ),
    "AugmentationSettings.affine": augmented("affine", 1),
    "AugmentationSettings.rotation": augmented("rotation", 40, "augmentation.affine=1"),
    "AugmentationSettings.scale": augmented("scale", 0.5, "augmentation.affine=1"),
    "AugmentationSettings.in_plane": augmented("in_plane", "true", "augmentation.affine=1"),
    "AugmentationSettings.elastic": augmented("elastic", 1),
    "AugmentationSettings.displacement": augmented("displacement", 1, "augmentation.elastic=1"),
    "AugmentationSettings.flip": augmented("flip", 1, "augmentation.flip_axes=[left-right]"),
    "AugmentationSettings.flip_axes": augmented("flip_axes", "[left-right]", "augmentation.flip=1"),
    "AugmentationSettings.bias_field": augmented("bias_field", 1),
    "AugmentationSettings.bias_magnitude": augmented("bias_magnitude", 0.9, "augmentation.bias_field=1"),
    "AugmentationSettings.gamma": augmented("gamma", 1),
    "AugmentationSettings.log_gamma": augmented("log_gamma", 0.9, "augmentation.gamma=1"),
    "AugmentationSettings.blur": augmented("blur", 1),
    "AugmentationSettings.blur_std": augmented("blur_std", 5, "augmentation.blur=1"),
    "AugmentationSettings.noise": augmented("noise", 1),
    "AugmentationSettings.noise_std": augmented("noise_std", 0.9, "augmentation.noise=1"),
    "ClipSettings.root": clip("data.root={broken}", names),
    "ClipSettings.videos": clip("data.videos={clips}", names, "data.root={listed}"),
    "ClipSettings.streams": clip("data.streams=flow", loaded, "data.flow_cache={out}/flow"),
    "ClipSettings.rate": clip("data.rate=5", loaded),
    "ClipSettings.skip_damaged": clip("data.skip_damaged=true", names, "data.root={broken}"),
    "ClipSettings.flow_cache": clip("data.flow_cache={out}/kept", cached, "data.streams=flow"),
    "ClipSettings.frames": clip("data.frames=4", drawn),
    "ClipSettings.stride": clip("data.stride=2", drawn, "data.frames=4"),
    "ClipSettings.side": clip("data.side=24", loaded, "data.crop=16"),
    "ClipSettings.crop": clip("data.crop=16", drawn),
    "ClipSettings.flip": clip("data.flip=false", drawn),
    "ClipSettings.validation_groups": clip("data.validation_groups=2", names),
    "ClipSettings.split_seed": clip("data.split_seed=1", names),
    "ClipSettings.folds": clip("data.folds=2", names),
    "ClipSettings.fold": clip("data.fold=1", names, "data.folds=3"),
    "UnlabelledSettings.cohorts": pre("data.cohorts=[{{root: {cohort}}},{{root: {other}}}]", files),
    "UnlabelledSettings.patch": pre("data.patch=[8,8,8]", drawn),
    "UnlabelledSettings.validation": pre("data.validation=2", names),
    "UnlabelledSettings.split_seed": pre("data.split_seed=1", names),
    "UnlabelledCohort.root": pre("data.cohorts=[{{root: {other}}}]", files),
    "UnlabelledCohort.modality": of_cohort("modality: CT", accepted),
    "UnlabelledCohort.spacing": of_cohort("spacing: [2, 2, 2]", loaded),
    "UnlabelledCohort.repeat": of_cohort("repeat: 2", names),
    "UnlabelledCohort.exclude_validation_of": of_cohort("exclude_validation_of: {config}", names),
    "PretextSettings.kind": pre("pretext.kind=restoration", drawn),
    "PretextSettings.cube": pre("pretext.cube=8", drawn),
    "PretextSettings.share": pre("pretext.share=0.2", drawn),
    "PretextSettings.shuffle": pre("pretext.shuffle=1", drawn, *RESTORED),
    "PretextSettings.bend": pre("pretext.bend=1", drawn, *RESTORED),
    "PretextSettings.paint": pre("pretext.paint=1", drawn, *RESTORED),
    "PretextSettings.paint_out": pre("pretext.paint_out=0", drawn, *RESTORED, "pretext.paint=1"),
    "PretextSettings.labels": pre("pretext.labels.rest=[3]", classes, "pretext.kind=synthetic"),
}


def known_keys():
    """Keys that tasks share stand under `Experiment`."""
    shared = set(keys_of(next(iter(TASKS.values())).__mro__[1]))
    own = {key for task in TASKS.values() for key in keys_of(task)}
    tasks = tuple(f"{task.__name__}." for task in TASKS.values())
    return sorted(shared | {key for key in own if not key.startswith(tasks)})


def test_no_entry_is_about_a_key_that_is_gone():
    assert set(KEYS) <= set(known_keys())


@pytest.mark.parametrize("key", known_keys())
@pytest.mark.filterwarnings("ignore:The maximum displacement:RuntimeWarning")
def test_a_key_changes_what_it_configures(key, places, seen, tmp_path, monkeypatch):
    assert key in KEYS, f"say in KEYS what {key} changes"
    change = KEYS[key]
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path / "cache"))
    without = Bench(places, tmp_path / "without", change, [], monkeypatch)
    changed = Bench(places, tmp_path / "changed", change, [change.override], monkeypatch)
    if accepted(without) and accepted(changed):
        assert changed_keys(without.experiment, changed.experiment) == {key.rpartition(".")[2]}
    what = (change.look, tuple(change.base), change.task)
    if what not in seen:
        seen[what] = change.look(without)
    assert seen[what] != change.look(changed)
