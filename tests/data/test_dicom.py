"""DICOM input: order and place of every pixel against the files' own tags, and what each odd input gets."""

import itk
import numpy as np
import pytest
from dicom_files import (
    APEX,
    GAP,
    PHASES,
    ROOT,
    SHORT_AXIS,
    SLICES,
    SPACING,
    cine,
    enhanced,
    image,
    position,
    set_pixels,
    value,
    write,
)
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from cardiac_qc_plugin.data.dicom import dicom_files, find_stacks, read_phase


def stacks_in(folder, series=()):
    return find_stacks(dicom_files(folder), series)


def check(stack, phases=range(PHASES), slices=range(SLICES)):
    """Every voxel holds the pixel that the files' tags put at its place and time."""
    assert len(stack.phases) == len(phases)
    for planes, t in zip(stack.phases, phases, strict=True):
        expected = np.stack([value(z, t).T for z in slices], axis=-1)
        np.testing.assert_array_equal(read_phase(planes), expected)
    # DICOM PS3.3 C.7.6.2.1.1, with LPS turned to RAS
    for i, j, k in ((0, 0, 0), (4, 5, 0), (2, 1, len(slices) - 1)):
        place = position(slices[k]) + i * SPACING[1] * SHORT_AXIS[0] + j * SPACING[0] * SHORT_AXIS[1]
        np.testing.assert_allclose(stack.affine @ (i, j, k, 1), [*(place * (-1, -1, 1)), 1], atol=1e-3)


def only(contents):
    (stack,) = contents.stacks
    return stack


def test_shuffled_files_with_meaningless_names(tmp_path):
    images = cine(lambda z, t: {"SliceLocation": float(37 * z % 5)})  # wrong, as in files of several scanners
    order = np.random.default_rng(0).permutation(len(images))
    write(tmp_path, [images[i] for i in order], [f"{chr(97 + n % 26)}{n}.{n % 3}" for n in range(len(images))])
    contents = stacks_in(tmp_path)
    stack = only(contents)
    check(stack)
    assert stack.spacing == pytest.approx((SPACING[1], SPACING[0], GAP), abs=1e-4)
    assert stack.times == pytest.approx([40.0 * t + 10 for t in range(PHASES)])
    assert stack.notes == [] and contents.skipped == []
    assert stack.subject == {"height_cm": 165.0, "weight_kg": 60.0}


@pytest.mark.filterwarnings("ignore:Invalid value")  # while writing
@pytest.mark.parametrize(
    ("size", "weight", "subject", "noted"),
    [
        (b"175 ", b"60", {"weight_kg": 60.0}, ["PatientSize is 175, not from 0.3 to 2.5 m; it is not used."]),
        (b"1,75", b"60", {"weight_kg": 60.0}, ["PatientSize is not one number; it is not used."]),
        (b"1.7\\1.8 ", b"60", {"weight_kg": 60.0}, ["PatientSize is not one number; it is not used."]),
        (b"1.65", b"60000 ", {"height_cm": 165.0}, ["PatientWeight is 60000, not from 1 to 400 kg; it is not used."]),
        (b"0 ", b"", {}, []),
    ],
)
def test_height_and_weight_that_cannot_be(tmp_path, size, weight, subject, noted):
    images = cine()
    for ds in images:
        for tag, content in ((0x00101020, size), (0x00101030, weight)):
            ds._dict[Tag(tag)] = RawDataElement(Tag(tag), "DS", len(content), content, 0, False, True)
    write(tmp_path, images)
    stack = only(stacks_in(tmp_path))
    assert stack.subject == subject and stack.notes == noted


@pytest.mark.parametrize("flip", ["order", "rows", "columns", "both"])
def test_slices_go_from_base_to_apex_whatever_the_order_and_orientation(tmp_path, flip):
    """Numbered from the apex; or stored upside down or mirrored, with the tags that say so."""

    def change(z, t):
        if flip == "order":
            return {"InstanceNumber": (SLICES - 1 - z) * PHASES + t + 1}
        corner, pixels = np.array(position(z)), value(z, t)
        axes = [axis.copy() for axis in SHORT_AXIS]
        if flip in ("columns", "both"):
            corner, pixels = corner + 4 * SPACING[1] * axes[0], pixels[:, ::-1]
            axes[0] *= -1
        if flip in ("rows", "both"):
            corner, pixels = corner + 5 * SPACING[0] * SHORT_AXIS[1], pixels[::-1]
            axes[1] *= -1
        return {
            "ImagePositionPatient": corner.round(6).tolist(),
            "ImageOrientationPatient": np.concatenate(axes).round(6).tolist(),
            "PixelData": pixels.astype("<i2").tobytes(),
        }

    write(tmp_path, cine(change)[::-1])
    stack = only(stacks_in(tmp_path))
    for t, planes in enumerate(stack.phases):
        voxels = read_phase(planes)
        for z in range(SLICES):
            for r, c in ((0, 0), (5, 4), (1, 3)):  # each pixel where it is in the patient
                place = position(z) + c * SPACING[1] * SHORT_AXIS[0] + r * SPACING[0] * SHORT_AXIS[1]
                i, j, k = np.linalg.solve(stack.affine, [*(place * (-1, -1, 1)), 1])[:3].round().astype(int)
                assert k == z and voxels[i, j, k] == value(z, t)[r, c]


def test_geometry_agrees_with_itk(tmp_path):
    """ITK's series reader, on the files of one phase."""
    write(tmp_path / "one", [ds for ds in cine() if ds.TriggerTime == 90])
    names = itk.GDCMSeriesFileNames.New(Directory=str(tmp_path / "one")).GetInputFileNames()
    read = itk.imread(list(names), pixel_type=itk.SS)
    write(tmp_path / "all", cine())
    stack = only(stacks_in(tmp_path / "all"))
    voxels = read_phase(stack.phases[2])
    other = itk.array_view_from_image(read)
    assert other.shape == voxels.shape[::-1]
    for index in np.ndindex(voxels.shape):
        lps = (stack.affine @ (*index, 1))[:3] * (-1, -1, 1)
        there = read.TransformPhysicalPointToIndex(lps.tolist())
        assert voxels[index] == other[there[2], there[1], there[0]]
        np.testing.assert_allclose(read.TransformIndexToPhysicalPoint(there), lps, atol=1e-3)


def test_multi_frame_in_any_order(tmp_path):
    pairs = [(z, t) for z in range(SLICES) for t in range(PHASES)]
    order = np.random.default_rng(1).permutation(len(pairs))
    write(tmp_path, [enhanced([pairs[i] for i in order])])
    check(only(stacks_in(tmp_path)))


@pytest.mark.parametrize("syntax", ["RLE", "JPEG lossless"])
def test_compressed(tmp_path, syntax):
    images = cine()
    for ds in images:
        if syntax == "RLE":
            ds.compress(RLELossless)
        else:
            compress_by_itk(ds, tmp_path / "scratch.dcm")
    write(tmp_path / "in", images)
    check(only(stacks_in(tmp_path / "in")))


def compress_by_itk(ds, scratch):
    """Lossless JPEG, old archives' usual compression, for which pydicom alone has no decoder."""
    io = itk.GDCMImageIO.New(CompressionType=itk.GDCMImageIOEnums.Compression_JPEG, UseCompression=True)
    itk.imwrite(itk.image_from_array(ds.pixel_array), str(scratch), imageio=io, compression=True)
    made = dcmread(scratch)
    assert made.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.PixelData = made.PixelData
    ds["PixelData"].VR = "OB"


@pytest.mark.parametrize("meta", [True, False])
def test_multi_frame_read_by_itk_with_a_scaling_for_each_frame(tmp_path, meta):
    write(tmp_path / "in", [scaled_multi_frame(tmp_path / "scratch.dcm")])
    if not meta:
        ds = scaled_multi_frame()
        del ds.file_meta
        dcmwrite(tmp_path / "in" / "IM0000", ds, implicit_vr=False, little_endian=True)
    voxels = read_phase(only(stacks_in(tmp_path / "in")).phases[1])
    np.testing.assert_allclose(voxels, np.stack([value(z, 1).T * (1.5 + z) - 3 for z in range(SLICES)], axis=-1))


def scaled_multi_frame(scratch=None):
    """One file whose scaling differs from slice to slice; compressed by way of the scratch file."""
    pairs = [(z, t) for t in range(PHASES) for z in range(SLICES)]
    ds = enhanced(pairs)
    for (z, _), frame in zip(pairs, ds.PerFrameFunctionalGroupsSequence, strict=True):
        scaling = Dataset()
        scaling.RescaleSlope, scaling.RescaleIntercept, scaling.RescaleType = 1.5 + z, -3.0, "US"
        frame.PixelValueTransformationSequence = [scaling]
    if scratch is not None:
        images = [image(z, t) for z, t in pairs]
        for single in images:
            compress_by_itk(single, scratch)
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.PixelData = encapsulate([next(generate_frames(i.PixelData, number_of_frames=1)) for i in images])
        ds["PixelData"].VR = "OB"
    return ds


def two_studies(folder):
    write(folder / "a", cine())
    write(folder / "b", cine(lambda z, t: {"StudyInstanceUID": f"{ROOT}22", "SOPInstanceUID": f"{ROOT}9.{z}.{t + 1}"}))


def test_two_studies(tmp_path):
    two_studies(tmp_path)
    contents = stacks_in(tmp_path)
    assert len(contents.stacks) == 2
    for stack in contents.stacks:
        check(stack)


def renumbered(z, t):
    """A de-identifier that numbers the images at random: trigger times tell the phases."""
    return {"InstanceNumber": int(np.random.default_rng(z).permutation(PHASES)[t]) + 1}


def leading_zeros(z, t):
    names = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    return {name: f"2.16.124.099.0{i}{z + 1 if i % 3 == 0 else ''}" for i, name in enumerate(names)} | {
        "SOPInstanceUID": f"2.16.0124.00{z}.0{t}"
    }


REMOVED = ("PatientName", "PatientID", "PatientSize", "PatientWeight", "StudyInstanceUID", "SeriesInstanceUID")
REMOVED += ("FrameOfReferenceUID", "SeriesDescription", "SeriesNumber", "ImageType", "SliceLocation", "SliceThickness")

# what is odd: changes by slice and phase, what is noted
READ = {
    "no SliceLocation": (lambda z, t: {"SliceLocation": None}, []),
    "no trigger times": (lambda z, t: {"TriggerTime": None}, []),
    "all trigger times 0": (lambda z, t: {"TriggerTime": 0}, []),
    "a slice without trigger times": (lambda z, t: {"TriggerTime": None} if z == 2 else {}, []),
    "a trigger time that is no number": (lambda z, t: {"TriggerTime": "nan"} if z == t == 2 else {}, []),
    "no instance numbers": (lambda z, t: {"InstanceNumber": None}, []),
    "instance numbers at random": (renumbered, []),
    "UIDs with leading zeros, a frame of reference per slice": (leading_zeros, []),
    "de-identified to the bone": (lambda z, t: dict.fromkeys(REMOVED), []),
    "a series for each slice": (lambda z, t: {"SeriesInstanceUID": f"{ROOT}3.{z + 1}", "SeriesNumber": 10 + z}, []),
    "another heart rate in each slice": (lambda z, t: {"TriggerTime": (38.0 + z) * t}, []),
    "positions off by rounding": (
        lambda z, t: {"ImagePositionPatient": (position(z) + 0.05 * APEX * (z % 2)).round(4).tolist()},
        [],
    ),
}


@pytest.mark.filterwarnings("ignore:Invalid value")  # while writing
@pytest.mark.parametrize("odd", READ)
def test_odd_but_read(tmp_path, odd):
    change, notes = READ[odd]
    write(tmp_path, cine(change))
    stack = only(stacks_in(tmp_path))
    for t, planes in enumerate(stack.phases):
        np.testing.assert_array_equal(
            read_phase(planes), np.stack([value(z, t).T for z in range(SLICES)], axis=-1), err_msg=odd
        )
    assert stack.notes == notes
    rates = [38.0 + z for z in range(SLICES)] if "heart rate" in odd else None
    expected = [np.mean(rates) * t if rates else 40.0 * t + 10 for t in range(PHASES)]
    assert stack.times == ([] if "trigger time" in odd else pytest.approx(expected))  # known only if all say so


def test_linked_folders_are_searched_once(tmp_path):
    write(tmp_path / "elsewhere", cine())
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in", target_is_directory=True)
    assert dicom_files(tmp_path / "in") == [tmp_path / "in" / "a" / f"IM{i:04d}" for i in range(SLICES * PHASES)]
    stack = only(stacks_in(tmp_path / "in"))
    check(stack)
    assert stack.notes == []
    (tmp_path / "elsewhere").rename(tmp_path / "in" / "z")
    (tmp_path / "in" / "a").unlink()
    (tmp_path / "in" / "a").symlink_to("z", target_is_directory=True)
    assert {file.parent.name for file in dicom_files(tmp_path / "in")} == {"z"}


def test_files_twice(tmp_path):
    write(tmp_path / "a", cine())
    write(tmp_path / "copy", cine()[:3])
    stack = only(stacks_in(tmp_path))
    check(stack)
    assert stack.notes == ["3 image(s) were there more than once; one of each is used."]
    other = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.9.1"}
    write(tmp_path / "other", cine(lambda z, t: {**other, "SOPInstanceUID": f"1.2.9.1.{z + 1}.{t + 1}"}))
    assert sorted(len(stack.notes) for stack in stacks_in(tmp_path).stacks) == [0, 1]  # of a series alike


def test_slice_acquired_twice(tmp_path):
    """The second time at another heart rate, so that sorting by time alone would mix the two."""
    again = [
        image(2, t, SOPInstanceUID=f"{ROOT}8.{t + 1}", InstanceNumber=100 + t, TriggerTime=43.0 * t + 5)
        for t in range(PHASES)
    ]
    for t, ds in enumerate(again):
        set_pixels(ds, value(2, t) + 1)
    write(tmp_path, again + cine())
    stack = only(stacks_in(tmp_path))
    for t, planes in enumerate(stack.phases):
        np.testing.assert_array_equal(read_phase(planes)[..., 2], value(2, t).T + 1)
    assert stack.notes == ["A slice was acquired several times; the last acquisition is used."]


NUMBERS = {  # of phases in order of time
    "from the middle of the cycle": lambda t: (t + 9) % 16,
    "odd phases first": lambda t: (t + 1) % 2 * 8 + t // 2,
    "every fourth phase": lambda t: t % 4 * 4 + t // 4,
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("uneven", [0, 0.02])  # then where the R wave came within the numbers tells
def test_numbers_that_do_not_follow_the_cycle_are_one_acquisition(tmp_path, numbers, uneven):
    def change(z, t):
        return {"InstanceNumber": NUMBERS[numbers](t) + 1, "TriggerTime": 40.0 * t * (1 + uneven * t)}

    write(tmp_path, cine(change, phases=16))
    stack = only(stacks_in(tmp_path))
    check(stack, phases=range(16))
    assert stack.notes == []


def test_missing_image_takes_the_nearest_phase(tmp_path):
    write(tmp_path, cine(lambda z, t: None if (z, t) == (1, 3) else {"TriggerTime": 40.0 * t + z}))
    stack = only(stacks_in(tmp_path))
    used = [plane.time for plane in (planes[1] for planes in stack.phases)]
    assert used in ([1, 41, 81, 81, 161, 201, 241, 281], [1, 41, 81, 161, 161, 201, 241, 281])
    assert "7 phases instead of 8" in stack.notes[0]


def test_varying_phases_per_slice(tmp_path):
    """A slice with ten phases in the same time among slices with eight, without trigger times."""
    images = cine(lambda z, t: {"TriggerTime": None}) + [
        image(1, t, TriggerTime=None, SOPInstanceUID=f"{ROOT}8.{t + 1}", InstanceNumber=100 + t) for t in (8, 9)
    ]
    write(tmp_path, images)
    stack = only(stacks_in(tmp_path))
    assert [planes[1].instance for planes in stack.phases] == [9, 10, 11, 12, 14, 15, 16, 108]
    assert "10 phases instead of 8" in stack.notes[0]


def test_missing_slice_is_its_neighbors_copy_and_noted(tmp_path):
    write(tmp_path, cine(lambda z, t: None if z == 2 else {}))
    stack = only(stacks_in(tmp_path))
    np.testing.assert_array_equal(read_phase(stack.phases[3])[..., 2], value(1, 3).T)
    np.testing.assert_array_equal(read_phase(stack.phases[3])[..., 3], value(3, 3).T)
    assert stack.spacing[2] == pytest.approx(GAP, abs=1e-3)
    assert stack.notes == ["Slice 3 is missing: a copy of slice 2 stands in its place."]


def test_slice_with_too_few_phases_is_left_out(tmp_path):
    write(tmp_path, cine(lambda z, t: None if z == 4 and t > 0 else {}))
    stack = only(stacks_in(tmp_path))
    check(stack, slices=range(4))
    assert stack.notes == ["1 slice(s) with fewer than half of the 8 phases are left out."]


def test_scaling_of_each_slice(tmp_path):
    """Philips scales each slice by itself."""
    write(tmp_path, cine(lambda z, t: {"RescaleSlope": 1.5 + z, "RescaleIntercept": -3.0}))
    stack = only(stacks_in(tmp_path))
    voxels = read_phase(stack.phases[1])
    assert voxels.dtype == np.float32
    np.testing.assert_allclose(voxels, np.stack([value(z, 1).T * (1.5 + z) - 3 for z in range(SLICES)], axis=-1))


HIGHEST, LOWEST = int(value(SLICES - 1, 1).max()), int(value(0, 1).min())


@pytest.mark.parametrize(
    ("intercept", "dtype"),
    [
        (2**15 - 1 - HIGHEST, np.int16),
        (2**15 - HIGHEST, np.float32),
        (-(2**15) - LOWEST, np.int16),
        (-(2**15) - 1 - LOWEST, np.float32),
    ],
)
def test_integers_that_16_bits_cannot_hold(tmp_path, intercept, dtype):
    write(tmp_path, cine(lambda z, t: {"RescaleSlope": 1, "RescaleIntercept": intercept}))
    voxels = read_phase(only(stacks_in(tmp_path)).phases[1])
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(
        voxels, np.stack([value(z, 1).T.astype(int) + intercept for z in range(SLICES)], axis=-1)
    )


@pytest.mark.parametrize("implicit", [True, False])
def test_without_preamble(tmp_path, implicit):
    for i, ds in enumerate(cine()):
        del ds.file_meta
        dcmwrite(tmp_path / f"{i}", ds, implicit_vr=implicit, little_endian=True)
    check(only(stacks_in(tmp_path)))


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("group", [2, 8])
def test_without_preamble_with_a_group_length(tmp_path, implicit, group):
    tag = bytes([group, 0, 0, 0])
    (tmp_path / "IM0").write_bytes(tag + (b"\x04\0\0\0" if implicit else b"UL\x04\0") + bytes(200))
    (tmp_path / "other").write_bytes(tag + bytes(200))
    assert dicom_files(tmp_path) == [tmp_path / "IM0"]


@pytest.mark.parametrize("name", ["cine_trufi_sax_p2", "tf2d13 SAX p3_iPAT", "SA cine p"])
def test_parallel_imaging_is_no_phase_image(tmp_path, name):
    write(tmp_path, cine(lambda z, t: {"SeriesDescription": name}))
    check(only(stacks_in(tmp_path)))


def test_phase_images_are_no_cine(tmp_path):
    write(tmp_path, cine(lambda z, t: {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}))
    (skipped,) = stacks_in(tmp_path).skipped
    assert "says 'P', which is no cine" in skipped.reason


def test_a_single_image_type_is_not_spelled(tmp_path):
    write(tmp_path, cine(lambda z, t: {"ImageType": "PRIMARY"}))
    check(only(stacks_in(tmp_path)))


def other_axes(row, down):
    return {"ImageOrientationPatient": [*map(float, row), *map(float, down)]}


AXIAL, SAGITTAL, CORONAL = ((1, 0, 0), (0, 1, 0)), ((0, 1, 0), (0, 0, -1)), ((1, 0, 0), (0, 0, -1))
LONG_AXIS = SHORT_AXIS[0].round(6), APEX.round(6)

# what is odd: changes by slice and phase, the reason, whether it counts as a failure
REFUSED = {
    "axial": (lambda z, t: other_axes(*AXIAL) | {"ImagePositionPatient": [0, 0, 8.0 * z]}, "not short-axis", False),
    "sagittal": (lambda z, t: other_axes(*SAGITTAL), "not short-axis", False),
    "coronal": (lambda z, t: other_axes(*CORONAL), "not short-axis", False),
    "four-chamber": (lambda z, t: other_axes(*LONG_AXIS), "not short-axis", False),
    "late enhancement": (lambda z, t: {"SeriesDescription": "SAX_LGE_PSIR"}, "says 'LGE'", False),
    "T1 map": (lambda z, t: {"SeriesDescription": "MOLLI sax"}, "says 'MOLLI'", False),
    "velocity": (lambda z, t: {"ImageType": ["DERIVED", "PRIMARY", "P"]}, "says 'P'", False),
    "one phase": (lambda z, t: {} if t == 0 else None, "fewer than 6 phases", False),
    "three slices": (lambda z, t: {} if z < 3 else None, "fewer than 4", False),
    "secondary capture": (lambda z, t: {"SOPClassUID": SecondaryCaptureImageStorage}, "not an MR image", False),
    "color": (lambda z, t: {"SamplesPerPixel": 3}, "color", False),
    "inverted gray": (lambda z, t: {"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1", False),
    "no position": (lambda z, t: {"ImagePositionPatient": None}, "no valid ImagePositionPatient", False),
    "no spacing": (lambda z, t: {"PixelSpacing": None}, "no valid PixelSpacing", False),
    "one number as spacing": (lambda z, t: {"PixelSpacing": 1.5}, "no valid PixelSpacing", False),
    "empty orientation": (lambda z, t: {"ImageOrientationPatient": []}, "no valid ImageOrientationPatient", False),
    "skewed orientation": (lambda z, t: other_axes((1, 0, 0), (1, 0, 0)), "right angle", False),
    "mixed spacing": (
        lambda z, t: {"ImagePositionPatient": (position(z) + (z > 2) * 3 * APEX).round(4).tolist()},
        "8, 11 mm apart",
        True,
    ),
    "two neighboring slices missing": (lambda z, t: None if z in (2, 3) else {}, "8, 24 mm apart", True),
    "slices shifted in plane": (
        lambda z, t: {"ImagePositionPatient": (position(z) + (z == 2) * 9 * SHORT_AXIS[0]).round(4).tolist()},
        "shifted in plane against each other by up to 9.0 mm",
        True,
    ),
    "every other slice mirrored": (
        lambda z, t: other_axes((-1) ** z * SHORT_AXIS[0].round(6), SHORT_AXIS[1].round(6)),
        "stored mirrored or upside down against the others",
        True,
    ),
    "phases that nothing tells apart": (
        lambda z, t: {"TriggerTime": None, "InstanceNumber": None},
        "neither trigger times nor instance numbers",
        True,
    ),
}


@pytest.mark.parametrize("odd", REFUSED)
def test_refused_with_the_reason(tmp_path, odd):
    change, reason, failed = REFUSED[odd]
    slices = {"two neighboring slices missing": 7, "every other slice mirrored": 10}.get(odd, SLICES)
    write(tmp_path, cine(change, slices=slices))
    contents = stacks_in(tmp_path)
    assert contents.stacks == []
    (skipped,) = contents.skipped
    assert reason in skipped.reason and skipped.failed == failed, skipped
    assert "7" in skipped.series


def test_a_series_that_is_asked_for_is_taken(tmp_path):
    change = REFUSED["late enhancement"][0]
    write(tmp_path, cine(change))
    check(only(stacks_in(tmp_path, series=(7,))))
    contents = stacks_in(tmp_path, series=(8,))
    assert not contents.stacks and "asked for" in contents.skipped[0].reason


def test_localizer_and_others_beside_a_cine(tmp_path):
    def other(number, axes):
        return lambda z, t: (
            other_axes(*axes)
            | {
                "SeriesNumber": number,
                "SeriesInstanceUID": f"{ROOT}30.{number}",
                "SOPInstanceUID": f"{ROOT}{number}.{z}.{t}",
            }
        )

    write(tmp_path / "sax", cine())
    for number, axes in ((1, AXIAL), (2, SAGITTAL), (3, LONG_AXIS)):
        write(tmp_path / str(number), cine(other(number, axes), slices=1))
    contents = stacks_in(tmp_path)
    check(only(contents))
    assert [skipped.series[:8] for skipped in contents.skipped] == ["series 1", "series 2", "series 3"]


def test_damaged_files_are_named_and_the_cine_is_read(tmp_path):
    write(tmp_path, cine())
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / "garbage").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(200)))
    (tmp_path / "empty").write_bytes(b"")
    directory = image(0, 0, SOPClassUID=MediaStorageDirectoryStorage)
    write(tmp_path, [directory], ["DICOMDIR"])
    contents = stacks_in(tmp_path)
    check(only(contents))
    (skipped,) = contents.skipped
    assert skipped.series == "file garbage"


@pytest.mark.filterwarnings("ignore:.*file")  # pydicom's, of the end of the file
def test_a_file_that_ends_within_its_header_is_named(tmp_path):
    *files, cut = write(tmp_path, cine())
    content = cut.read_bytes()
    for end in range(140, content.index(b"\x28\0\0\1US") + 4, 4):  # to BitsAllocated
        cut.write_bytes(content[:end])
        (skipped,) = find_stacks([cut]).skipped
        assert skipped.series == f"file {cut.name}", f"{end}: {skipped}"
    stack = only(stacks_in(tmp_path))
    assert len(stack.phases) == PHASES and "7 phases instead of 8" in stack.notes[0]


def test_a_multi_frame_file_without_some_of_its_frames_is_named(tmp_path):
    ds = enhanced([(z, t) for z in range(SLICES) for t in range(PHASES)])
    del ds.PerFrameFunctionalGroupsSequence[-1]
    write(tmp_path, [ds])
    (skipped,) = stacks_in(tmp_path).skipped
    assert skipped.series == "file IM0000" and "39 frames described, 40 in the file" in skipped.reason


def test_truncated_pixels_are_an_error_that_names_the_file(tmp_path):
    files = write(tmp_path, cine())
    files[3].write_bytes(files[3].read_bytes()[:-20])
    stack = only(stacks_in(tmp_path))
    with pytest.raises(ValueError, match=r"IM0003: its pixels cannot be read"):
        read_phase(stack.phases[3])


@pytest.mark.filterwarnings("ignore:.*file")
@pytest.mark.parametrize("cut", [20, 100])  # within the pixels, and before them
@pytest.mark.parametrize("compressed", [True, False])
def test_truncated_pixels_that_pydicom_does_not_read_from_the_file(tmp_path, cut, compressed):
    for i, ds in enumerate(cine()):
        if compressed:
            compress_by_itk(ds, tmp_path / "scratch.dcm")
            ds.save_as(tmp_path / f"{i}", enforce_file_format=True)
        else:
            del ds.file_meta
            dcmwrite(tmp_path / f"{i}", ds, implicit_vr=False, little_endian=True)
    (tmp_path / "scratch.dcm").unlink(missing_ok=True)
    stack = only(stacks_in(tmp_path))
    (tmp_path / "3").write_bytes((tmp_path / "3").read_bytes()[:-cut])
    with pytest.raises(ValueError, match="3: its pixels cannot be"):
        read_phase(stack.phases[3])


def test_no_patient_name_in_any_reason(tmp_path):
    def change(z, t):
        return {"SeriesDescription": "GOLDMANN heart", "ImagePositionPatient": None}

    write(tmp_path, cine(change, phases=1))
    (tmp_path / "emilia.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(200)))
    text = " ".join(map(str, stacks_in(tmp_path).skipped)).lower()
    assert "heart" in text and "goldmann" not in text and "emilia" not in text


def test_empty_dataset_is_no_image(tmp_path):
    ds = Dataset()
    ds.PatientName = "Goldmann^Emilia"
    dcmwrite(tmp_path / "a.dcm", ds, implicit_vr=False, little_endian=True)
    assert not stacks_in(tmp_path).stacks


def test_encapsulated_rubbish(tmp_path):
    images = cine()
    images[5].file_meta.TransferSyntaxUID = JPEG2000Lossless
    images[5].PixelData = encapsulate([b"no code stream"])
    images[5]["PixelData"].VR = "OB"
    write(tmp_path, images)
    stack = only(stacks_in(tmp_path))
    with pytest.raises(ValueError, match="IM0005"):
        read_phase(stack.phases[5])
