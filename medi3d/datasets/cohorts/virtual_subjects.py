"""Virtual subjects: a labelled MR cohort that needs no download and no patient.

A subject is the ICBM152 2009 T1 template (Fonov et al., 2011, doi:10.1016/j.neuroimage.2010.07.033) and its
maps of grey and white matter, as nilearn ships them, deformed together, then given another contrast, a bias
field and noise by TorchIO. It looks like a brain scan and shows that a pipeline works; what a network learns
from it says nothing about patients.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medi3d.datasets.sampling.stream import seeded
from medi3d.errors import ConfigError, DataError
from medi3d.files import written_aside

LABELS = {"grey matter": 1, "white matter": 2}
NOTICE = "VIRTUAL SUBJECTS: the ICBM152 template, deformed and changed at random. No image is of a person."
MARGIN = 3
"""Margin around the brain, in voxels, for tissue that the deformation moves outwards."""


@dataclass(frozen=True)
class VirtualSettings:
    """A cohort of virtual subjects (config section `cohort`).

    Attributes:
        labelled: Subjects to train and validate on (`imagesTr`, `labelsTr`).
        held_out: Further subjects, for prediction (`imagesTs`, `labelsTs`).
        spacing: Side of the voxels in mm, the same along all axes; 1 at the finest.
        displacement: Largest shift of a control point of the deformation, in mm.
        log_gamma: Largest logarithm of the exponent that changes the contrast.
        bias: Largest coefficient of the bias field.
        noise: Largest deviation of the noise; the brightest voxel is about 1.
        seed: Subject number i follows from the seed and i alone.
    """

    labelled: int = 12
    held_out: int = 1
    spacing: int = 3
    displacement: float = 10.0
    log_gamma: float = 0.5
    bias: float = 0.5
    noise: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labelled < 2 or self.held_out < 0:
            raise ConfigError(
                f"cohort has {self.labelled} labelled and {self.held_out} held-out subjects: "
                "at least 2 labelled, one to train and one to validate on"
            )
        if not 1 <= self.spacing <= 10:
            raise ConfigError(f"cohort.spacing is {self.spacing}: a whole number of mm from 1 to 10")
        for key in ("displacement", "log_gamma", "bias", "noise"):
            if getattr(self, key) < 0:
                raise ConfigError(f"cohort.{key} is {getattr(self, key)}: 0 or more")


def write_cohort(root: Path, settings: VirtualSettings, progress: Callable[[str], None] = print) -> bool:
    """Write the cohort in the layout of the Medical Segmentation Decathlon, unless it is there already.

    Args:
        root: Folder; `dataset.json` is written last, so that a cohort with it is complete.
        settings: Settings of the cohort.
        progress: Called with a line for each subject.

    Returns:
        False if `root` already has exactly this cohort.

    Raises:
        ConfigError: nilearn is not installed.
        DataError: `root` cannot be written.
    """
    listing = root / "dataset.json"
    names = [f"virtual_{number:03d}" for number in range(settings.labelled + settings.held_out)]
    content = _describe(settings, names)
    if listing.is_file() and json.loads(listing.read_text()) == content:
        return False
    template = load_template(settings.spacing)
    try:
        listing.unlink(missing_ok=True)
        for number, name in enumerate(names):
            _write_subject(root, name, template, settings, number)
            progress(f"virtual subject {number + 1} of {len(names)}")
        with written_aside(listing) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error.strerror}); give another folder") from error
    return True


@dataclass(frozen=True)
class Template:
    """The average brain that all virtual subjects come from.

    Attributes:
        maps: `(3, X, Y, Z)` float32: T1 intensity, share of grey matter, share of white matter, each 0 to 1.
        affine: `(4, 4)`, voxel to mm in RAS, as NIfTI has it.
    """

    maps: torch.Tensor
    affine: np.ndarray


def load_template(spacing: int) -> Template:
    """The template at `spacing` mm, cut to the brain with a margin. Needs the extra `demo`.

    Raises:
        ConfigError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ConfigError("virtual subjects need nilearn: pip install 'medi3d[demo]'") from error
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    images = [load(resolution=spacing) for load in loaders]
    maps = np.stack([np.asarray(image.dataobj, dtype=np.float32) for image in images])
    occupied = np.argwhere(maps[1:].sum(0) > 0.1)
    low = np.maximum(occupied.min(0) - MARGIN, 0)
    high = np.minimum(occupied.max(0) + 1 + MARGIN, maps.shape[1:])
    affine = np.array(images[0].affine)
    affine[:3, 3] += affine[:3, :3] @ low
    cut = maps[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    return Template(torch.from_numpy(np.ascontiguousarray(cut)), affine)


def _write_subject(root: Path, name: str, template: Template, settings: VirtualSettings, number: int) -> None:
    part = "Tr" if number < settings.labelled else "Ts"
    image, label = virtual_subject(template, settings, number)
    for folder, values in ((f"images{part}", image), (f"labels{part}", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, template.affine), root / folder / f"{name}.nii.gz")


def virtual_subject(
    template: Template, settings: VirtualSettings, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Subject `number`: image float32 and label uint8, both `(X, Y, Z)`; the same at every call."""
    import torchio as tio

    shape, contrast = _transforms(settings)
    with seeded(settings.seed, number):
        # Deformed as maps, not as labels, so that tissue borders stay aligned with the intensities.
        maps = tio.ScalarImage(tensor=template.maps, affine=template.affine)
        deformed = shape(tio.Subject(maps=maps))["maps"].data
        image = contrast(tio.ScalarImage(tensor=deformed[:1].clamp(0, 1), affine=template.affine))
    grey, white = deformed[1], deformed[2]
    label = torch.zeros_like(grey, dtype=torch.uint8)
    label[grey >= 0.5] = LABELS["grey matter"]
    label[(white >= 0.5) & (white > grey)] = LABELS["white matter"]
    # A scanner gives magnitudes, in an arbitrary unit.
    return (image.data[0].abs() * 1000).numpy(), label.numpy()


def _transforms(settings: VirtualSettings) -> tuple[Any, Any]:
    """The transforms of the head's shape, and those of the scanner."""
    import torchio as tio

    shape = tio.Compose(
        [
            tio.RandomAffine(scales=0.12, degrees=12, translation=4, default_pad_value=0),
            # Two fixed layers of control points: the border of the volume stays in place.
            tio.RandomElasticDeformation(num_control_points=8, max_displacement=settings.displacement),
        ]
    )
    contrast = tio.Compose(
        [
            tio.RandomGamma(log_gamma=settings.log_gamma),
            tio.RandomBiasField(coefficients=settings.bias),
            tio.RandomNoise(std=(settings.noise / 2, settings.noise)),
        ]
    )
    return shape, contrast


def _describe(settings: VirtualSettings, names: list[str]) -> dict[str, Any]:
    labelled, held_out = names[: settings.labelled], names[settings.labelled :]
    return {
        "name": "virtual subjects",
        "description": NOTICE,
        "reference": "ICBM152 2009 T1 template and tissue maps (Fonov et al., 2011), from nilearn",
        "modality": {"0": "MRI (virtual)"},
        "labels": {"0": "background", **{str(value): name for name, value in LABELS.items()}},
        "generator": asdict(settings),
        "numTraining": len(labelled),
        "numTest": len(held_out),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in labelled
        ],
        "test": [f"./imagesTs/{name}.nii.gz" for name in held_out],
    }
