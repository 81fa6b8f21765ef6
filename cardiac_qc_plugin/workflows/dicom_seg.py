"""Results as DICOM Segmentation objects, which refer to the images that they were made from."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import DataElement, Dataset, config, dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import MRImageStorage, generate_uid
from pydicom.valuerep import DA, TM

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.data.dicom import dicom_files, frame_group
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES

from .files import MASKS, read_json, read_volume, write_file
from .references import Outcome

__all__ = ["write_dicom_seg"]

MEANING = {
    "RV": ("RV cavity", codes.SCT.AnatomicalStructure, codes.SCT.RightVentricle),
    "LVM": ("LV myocardium", codes.SCT.AnatomicalStructure, Code("74281007", "SCT", "Myocardium")),
    "LV": ("LV cavity", codes.SCT.AnatomicalStructure, codes.SCT.LeftVentricle),
    "failure": (
        "Expected segmentation failure",
        Code("309825002", "SCT", "Spatial and Relational Concept"),
        Code("failure", "99CQC", "Expected failure of automatic segmentation"),
    ),
}
# may be empty, but not missing
PATIENT_AND_STUDY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
PATIENT_AND_STUDY += ("AccessionNumber", "ReferringPhysicianName")
PLACE = {
    "PlanePosition": ("ImagePositionPatient",),
    "PlaneOrientation": ("ImageOrientationPatient",),
    "PixelMeasures": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
}
SEGMENTS = dict(zip(MASKS, (tuple(CLASS_NAMES.values()), ("failure",)), strict=True))


def write_dicom_seg(predictions: str | Path, dicom: str | Path) -> Outcome:
    """Write ``segmentation.dcm`` and ``failure_regions.dcm`` into the folder of every phase that came from DICOM.

    Both are binary DICOM Segmentations on the planes of their source images, with a segment for each structure, or one
    for the flagged regions. A file without any voxel to hold is not written. As every DICOM object they carry the
    patient's identity from their source images. A slice that was missing, and is a neighbor's copy in the
    results, is left out.

    Args:
        predictions: output folder of ``run`` on DICOM.
        dicom: folder of the source images; they are found by their UIDs.

    Returns:
        What was written, and what could not be.

    Raises:
        ValueError: if highdicom is missing, no result came from DICOM, or there is no DICOM file.
        OSError: a file cannot be written.
    """
    try:
        import highdicom  # noqa: F401 (an optional package)
    except ImportError as error:
        raise ValueError("DICOM Segmentations need highdicom: pip install 'cardiac-qc-plugin[dicom]'.") from error
    records = sorted(Path(predictions).glob("*/dicom.json"))
    if not records:
        raise ValueError(f"{predictions}: no dicom.json in its folders. Give the output folder of 'run' on DICOM.")
    files = dicom_files(dicom)
    if not files:
        raise ValueError(f"{dicom}: no such folder, or no DICOM file in it. Give the folder of the source images.")
    sources = {}
    with config.disable_value_validation(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string .* person name")  # it has the patient's name in it
        for file in files:
            try:
                header = dcmread(file, stop_before_pixels=True, specific_tags=["SOPInstanceUID"], force=True)
                sources[str(header.get("SOPInstanceUID"))] = file
            except Exception:  # noqa: BLE001 (unreadable or damaged; a phase that needs it says that it is missing)
                continue
        # kept: a multi-frame file has many phases
        read = lru_cache(maxsize=64)(partial(dcmread, stop_before_pixels=True, force=True))
        written, failures = 0, {}
        for record in records:
            try:
                content = read_json(record)
            except ValueError as error:
                failures[record.parent.name] = str(error)
                continue
            images = content.get("images", [])
            folders = sorted(record.parent.glob("phase*")) or [record.parent]
            if len(folders) != len(images):
                failures[record.parent.name] = f"{len(folders)} phase(s), but {record} has {len(images)}. Run it again."
                continue
            for folder, planes in zip(folders, images, strict=True):
                try:
                    written += _write_phase(folder, planes, content["spacing_mm"][2], sources, read)
                except (ValueError, AttributeError, TypeError) as error:  # highdicom's, of a tag that is absent or odd
                    failures[folder.relative_to(predictions).as_posix()] = str(error)
    lines = [f"{written} DICOM Segmentation(s) in {predictions}."]
    lines += [f"FAILED {case}: {message}" for case, message in failures.items()]
    return Outcome("\n".join(lines), failures)


def _write_phase(
    folder: Path,
    planes: Sequence[dict[str, Any]],
    step: float,
    sources: dict[str, Path],
    read: Callable[[Path], Dataset],
) -> int:
    """The files of a phase, whose slices are ``step`` mm apart; returns how many were written."""
    places = [(plane["uid"], plane["frame"]) for plane in planes]
    missing = [uid for uid, _ in places if uid not in sources]
    if missing:
        count = f"{len(missing)} of its {len(places)}"
        raise ValueError(f"{count} source images are not in the DICOM folder, or cannot be read.")
    once = [z for z, place in enumerate(places) if place not in places[:z]]
    frames = [(read(sources[uid]), index) for uid, index in (places[z] for z in once)]
    images = [
        copy.deepcopy(image) if image.SOPClassUID == MRImageStorage else _single_frame(image, i) for image, i in frames
    ]
    for image in images:
        _complete(image, images[0], step)
    stand_for = {str(image.SOPInstanceUID): frame for image, frame in zip(images, frames, strict=True)}
    written = 0
    for name, segments in SEGMENTS.items():
        path = folder / f"{name}.dcm"
        path.unlink(missing_ok=True)
        source = folder / f"{name}.nii.gz"
        # (slice, row, column) from (column, row, slice)
        labels = read_volume(source).data[..., once].T if source.is_file() else np.zeros(1)
        if labels.any():
            masks = np.stack([labels == n for n in CLASS_NAMES] if len(segments) > 1 else [labels > 0], axis=-1)
            segmentation = _segmentation(images, masks.astype(np.uint8), segments)
            _refer_to_sources(segmentation, stand_for)
            write_file(path, segmentation.save_as)
            written += 1
    return written


def _single_frame(image: Dataset, index: int) -> Dataset:
    """A frame of a multi-frame image as an image of its own: of multi-frame ones highdicom takes all frames or none."""
    own = {"PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "NumberOfFrames"}
    own |= {"SOPClassUID", "SOPInstanceUID"}
    frame = Dataset({element.tag: copy.deepcopy(element) for element in image if element.keyword not in own})
    for group, names in PLACE.items():
        found = frame_group(image, index, group)
        for name in names:
            if name in found:
                frame[name] = copy.deepcopy(found[name])
    frame.SOPClassUID, frame.SOPInstanceUID = MRImageStorage, generate_uid()
    return frame


def _refer_to_sources(segmentation: Dataset, stand_for: dict[str, tuple[Dataset, int]]) -> None:
    """Let a Segmentation refer to the frames (a file's header, number from 0) that its images stood for, by series."""
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        derivations = copy.deepcopy(frame.DerivationImageSequence)  # highdicom has one item in several frames
        for item in (source for derivation in derivations for source in derivation.SourceImageSequence):
            image, index = stand_for[item.ReferencedSOPInstanceUID]
            if image.SOPClassUID != MRImageStorage:
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
                item.ReferencedFrameNumber = index + 1
        frame.DerivationImageSequence = derivations
    (listed,) = segmentation.ReferencedSeriesSequence
    series: dict[str, dict[str, Dataset]] = {}
    for item in listed.ReferencedInstanceSequence:
        image, _ = stand_for[item.ReferencedSOPInstanceUID]
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        own = series.setdefault(image.get("SeriesInstanceUID") or listed.SeriesInstanceUID, {})
        own[image.SOPInstanceUID] = reference
    segmentation.ReferencedSeriesSequence = [_referenced_series(uid, list(own.values())) for uid, own in series.items()]


def _referenced_series(uid: str, instances: Sequence[Dataset]) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID, item.ReferencedInstanceSequence = uid, instances
    return item


def _complete(image: Dataset, first: Dataset, step: float) -> None:
    """Bring an image that a de-identifier has been at to what a Segmentation's source has to be, in memory.

    Its text becomes UTF-8: highdicom refuses some character sets that others write.
    """
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not first.get(name):
            raise ValueError(f"its source images have no {name}, to which a DICOM Segmentation has to refer.")
    # one per slice at some scanners, one per file after some de-identifiers: highdicom takes images of one only
    image.SeriesInstanceUID, image.FrameOfReferenceUID = first.SeriesInstanceUID, first.FrameOfReferenceUID
    for name in PATIENT_AND_STUDY:
        if name not in image:
            setattr(image, name, "")
    if image.PatientSex not in ("M", "F", "O"):
        image.PatientSex = ""
    image.Modality = image.get("Modality") or "MR"
    if not _positive(image.get("SliceThickness")):
        image.SliceThickness = round(step, 6)
    image.decode()
    image.SpecificCharacterSet = "ISO_IR 192"
    for element in [e for e in image if e.VR in ("DA", "TM") and not _valid(e)]:
        element.value = ""


def _positive(value: Any) -> bool:
    try:
        return 0 < float(value) < np.inf
    except (TypeError, ValueError):
        return False


def _valid(element: DataElement) -> bool:
    """Whether a date or time is one: de-identifiers write 20120000."""
    try:
        (DA if element.VR == "DA" else TM)(element.value)
    except ValueError:
        return False
    return True


def _segmentation(images: Sequence[Dataset], masks: np.ndarray, segments: Sequence[str]) -> Dataset:
    """A DICOM Segmentation of masks (slice, row, column, segment), those without a pixel left out."""
    import highdicom as hd

    algorithm = hd.AlgorithmIdentificationSequence(
        name="cardiac_qc_plugin", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    present = [index for index in range(len(segments)) if masks[..., index].any()]
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=MEANING[segments[index]][0],
            segmented_property_category=MEANING[segments[index]][1],
            segmented_property_type=MEANING[segments[index]][2],
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, index in enumerate(present, start=1)
    ]
    return hd.seg.Segmentation(
        source_images=images,
        pixel_array=masks[..., present],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=9000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="cardiac_qc_plugin",
        manufacturer_model_name="cardiac_qc_plugin",
        software_versions=__version__,
        device_serial_number="0",
        series_description=" and ".join(segments) + " (research only)",
    )
