"""DICOM cines made by pydicom, whose pixels say which slice, phase, row and column they are."""

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage

ROWS, COLUMNS, SLICES, PHASES = 6, 5, 5, 8
ROW = np.array([-0.104592, 0.346381, -0.932245])  # of a patient: along a row, from left to right
DOWN = np.array([-0.733192, -0.660188, -0.163037])
SHORT_AXIS = ROW / np.linalg.norm(ROW), DOWN / np.linalg.norm(DOWN)
APEX = -np.cross(*SHORT_AXIS)  # toward the apex: the left, the front and the feet
SPACING = (1.5, 1.25)  # between rows, between columns
GAP = 8.0
ROOT = "1.2.826.0.1.3680043.8.498."


def value(z, t, rows=ROWS, columns=COLUMNS):
    """Pixels (row, column) of slice z (0 is the base) in phase t."""
    r, c = np.indices((rows, columns))
    return (2000 * z + 100 * t + 10 * r + c).astype(np.int16)


def position(z, gap=GAP):
    return np.array([20.0, 30.0, 140.0]) + gap * z * APEX


def image(z, t, **changes):
    """A single-frame MR image; ``changes`` by keyword, None removes an element."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = f"{ROOT}1.{z + 1}.{t + 1}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}2", f"{ROOT}3"
    ds.FrameOfReferenceUID = f"{ROOT}4"
    ds.Modality, ds.SeriesNumber, ds.SeriesDescription = "MR", 7, "cine SAX"
    ds.PatientName, ds.PatientID = "Goldmann^Emilia", "MRN4711"
    ds.PatientSize, ds.PatientWeight = 1.65, 60
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.InstanceNumber = z * PHASES + t + 1
    ds.TriggerTime = 40.0 * t + 10
    ds.ImagePositionPatient = [float(f"{x:.6f}") for x in position(z)]
    ds.ImageOrientationPatient = [float(f"{x:.6f}") for x in np.concatenate(SHORT_AXIS)]
    ds.PixelSpacing = list(SPACING)
    ds.SliceThickness = 6
    ds.SliceLocation = GAP * z
    set_pixels(ds, value(z, t))
    for name, content in changes.items():
        if content is None:
            del ds[name]
        else:
            setattr(ds, name, content)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2")
    return ds


def set_pixels(ds, pixels):
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelData = pixels.astype("<i2").tobytes()


def cine(change=None, slices=SLICES, phases=PHASES):
    """Images of a cine; ``change(z, t)`` gives the changes of each, or None to leave it out."""
    result = []
    for z in range(slices):
        for t in range(phases):
            changes = change(z, t) if change else {}
            if changes is not None:
                result.append(image(z, t, **changes))
    return result


def enhanced(order):
    """One multi-frame file with the (slice, phase) pairs in the order given."""
    first = image(0, 0)
    ds = image(0, 0, SOPClassUID=EnhancedMRImageStorage, SOPInstanceUID=f"{ROOT}5")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "TriggerTime", "InstanceNumber"):
        del ds[name]
    set_pixels(ds, np.stack([value(z, t) for z, t in order]))
    ds.NumberOfFrames = len(order)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 6
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for z, t in order:
        frame, place, trigger, content = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = image(z, t).ImagePositionPatient
        trigger.NominalCardiacTriggerDelayTime = 40.0 * t + 10
        content.TemporalPositionIndex = t + 1
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([place]), Sequence([content])
        frame.CardiacSynchronizationSequence = Sequence([trigger])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return ds


def write(folder, images, names=None):
    """Write images under given names, or IM0001 and so on; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / (names[i] if names else f"IM{i:04d}") for i in range(len(images))]
    for ds, file in zip(images, files, strict=True):
        ds.save_as(file, enforce_file_format=True)
    return files
