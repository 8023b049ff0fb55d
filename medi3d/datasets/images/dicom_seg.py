"""Write a mask as a DICOM Segmentation object (DICOM PS3.3 A.51) that refers to the slices of its series."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import generate_uid
from pydicom.valuerep import DSfloat

from medi3d.datasets.images.dicom import Series, onto_slices, open_series, series_grid
from medi3d.datasets.images.geometry import grid_difference
from medi3d.errors import DataError, ShapeError
from medi3d.files import writing, written_aside

log = logging.getLogger(__name__)


def write_seg(mask: sitk.Image, labels: Mapping[str, int], series: Path, out: Path, *, version: str) -> None:
    """Write a mask as a DICOM Segmentation; viewers overlay it on the slices that it refers to.

    The object's identifiers follow from series, labels and mask: equal masks have equal identifiers.

    Args:
        mask: Integers on the grid of the series.
        labels: Name -> value in the mask; each becomes a segment, numbered in this order.
        series: The folder of the DICOM series.
        out: The file to write.
        version: The program's version, for the header.

    Raises:
        ShapeError: The mask is not on the grid of the series.
        DataError: The series cannot be read or lacks what DICOM requires, or highdicom is missing.
    """
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise DataError(f"{out}: DICOM SEG needs highdicom; install medi3d[dicom]") from error
    opened = open_series(series)
    difference = grid_difference(mask, series_grid(series))
    if difference:
        raise ShapeError(f"the mask is not on the grid of {series}: {difference}")
    mask = onto_slices(mask, series)  # kept in a variable: a view does not keep its image alive
    array = _numbered(sitk.GetArrayViewFromImage(mask), labels)
    slices = opened.slices
    if slices[0].frame is not None:
        array = _in_order_of_frames(array, opened)
        slices = slices[:1]
    try:
        sources = [dcmread(one.path, stop_before_pixels=True) for one in slices]
    except (OSError, InvalidDicomError) as error:
        raise DataError(f"{series}: cannot be read again: {error}") from error
    for source in sources:
        _complete(source, float(np.linalg.norm(opened.line.step)))
    _identify(sources, series)
    algorithm = hd.AlgorithmIdentificationSequence(
        name="medi3d", version=version, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(labels, start=1)
    ]
    content = hashlib.sha256(array.tobytes()).hexdigest()
    seed = [sources[0].SeriesInstanceUID, repr(dict(labels)), content]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values of the source that violate the standard
        try:
            seg = hd.seg.Segmentation(
                source_images=sources,
                pixel_array=array,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=generate_uid(entropy_srcs=[*seed, "series"]),
                series_number=1000,
                sop_instance_uid=generate_uid(entropy_srcs=[*seed, "object"]),
                instance_number=1,
                manufacturer="medi3d",
                manufacturer_model_name="medi3d",
                software_versions=version,
                device_serial_number="0",
                series_description="medi3d segmentation",
                omit_empty_frames=bool(array.any()),
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(f"{series}: DICOM SEG cannot refer to this series: {error}") from error
        with writing(out), written_aside(out) as aside:
            seg.save_as(aside)


def _numbered(mask: np.ndarray, labels: Mapping[str, int]) -> np.ndarray:
    """The mask's values as numbers of the segments, 1, 2, ..."""
    array = np.zeros(mask.shape, np.uint8)
    for number, value in enumerate(labels.values(), start=1):
        array[mask == value] = number
    return array


def _in_order_of_frames(array: np.ndarray, series: Series) -> np.ndarray:
    """The mask (slices, rows, columns) in the order of the frames of a multi-frame file."""
    files = {one.path for one in series.slices}
    if len(files) > 1:
        raise DataError(
            f"{series.path}: {len(files)} multi-frame files make one volume; a DICOM SEG can refer "
            "to one only, use another --format"
        )
    frames = int(dcmread(series.slices[0].path, specific_tags=["NumberOfFrames"]).NumberOfFrames)
    ordered = np.zeros((frames, *array.shape[1:]), array.dtype)
    ordered[[one.frame or 0 for one in series.slices]] = array
    return ordered


def _complete(source: Any, step: float) -> None:
    """Give a slice the attributes that DICOM requires, empty where they are missing.

    A missing SliceThickness is the distance between slices: the frames of the object tile the volume.

    An identifier that an anonymiser emptied is still in the file's meta header.
    """
    for name in ("SOPClassUID", "SOPInstanceUID"):
        if not source.get(name):
            setattr(source, name, source.file_meta.get(f"MediaStorage{name}", ""))
    required = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")
    for name in (*required, "StudyDate", "StudyTime", "ReferringPhysicianName"):
        if name not in source:
            setattr(source, name, "")
    shared = source.get("SharedFunctionalGroupsSequence") or [{}]
    frames = source.get("PerFrameFunctionalGroupsSequence") or []
    groups = [group.get("PixelMeasuresSequence") for group in (*shared, *frames)]
    for measures in [part[0] for part in groups if part] or [source]:
        if not measures.get("SliceThickness"):
            measures.SliceThickness = DSfloat(step, auto_format=True)


def _identify(sources: Sequence[Any], series: Path) -> None:
    """Give study and series an identifier, made from the slices', if an anonymiser emptied theirs.

    The object then refers to the right slices, but no archive knows its study; a warning says so.
    """
    slices = [str(source.SOPInstanceUID) for source in sources]
    if not all(slices):
        raise DataError(f"{series}: slices without SOPInstanceUID; a DICOM SEG cannot refer to them")
    if len(set(slices)) < len(slices):
        twice, count = Counter(slices).most_common(1)[0]
        raise DataError(
            f"{series}: {count} different slices have the SOPInstanceUID {twice}, so a DICOM "
            "SEG cannot say which it means; use another --format, or give each slice its own UID"
        )
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        if any(source.get(name) for source in sources):
            continue
        made = generate_uid(entropy_srcs=[*slices, name])
        log.warning("%s: has no %s; its DICOM SEG is given %s", series, name, made)
        for source in sources:
            setattr(source, name, made)
