"""Short-axis cine phantom: a beating heart in a chest, made from code only, with exact labels.

It looks like a balanced SSFP cine at 1.5 T as ACDC stores it (bright blood, dark myocardium, nearly black
lung), in the array orientation of ACDC's files: rows (axis 0) from the sternum to the back, columns (axis 1)
from the left lung to the liver, slices (axis 2) from base to apex. Lengths are in mm whatever the grid.
Demonstrations and tests need no patient's data; a score on the phantom says nothing about patients.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from scipy import ndimage

ES_PHASE = 0.35

# By ACDC's disease group: LV ejection fraction; LV radius, LV wall and RV depth (mm) at mid-ventricle in ED.
GROUPS = {
    "NOR": {"ejection": (0.55, 0.70), "lv_radius": (22, 26), "wall": (6.5, 8.5), "rv_depth": (25, 31)},
    "DCM": {"ejection": (0.25, 0.38), "lv_radius": (30, 34), "wall": (7.0, 9.5), "rv_depth": (23, 30)},
    "HCM": {"ejection": (0.60, 0.70), "lv_radius": (22, 25), "wall": (10.0, 13.0), "rv_depth": (22, 28)},
    "MINF": {"ejection": (0.28, 0.45), "lv_radius": (26, 31), "wall": (7.0, 9.0), "rv_depth": (22, 29)},
    "RV": {"ejection": (0.50, 0.65), "lv_radius": (20, 24), "wall": (5.5, 7.0), "rv_depth": (34, 42)},
}
TAPER = 2.5  # radius^2 ~ 1 - (depth / length)^TAPER: nearly a cylinder at the base, round at the apex
FILLING = TAPER / (TAPER + 1)  # volume of that body over the volume of its cylinder


@dataclass(frozen=True)
class ShortAxisPhantom:
    """One heart and chest; everything random about it is drawn from its seed.

    The stack is centered on the heart, 68 to 84 mm long: of the default ten slices of 10 mm the first shows
    atria and outflow tract and the last no heart, both without labels. A shorter stack shows only the middle
    of the heart, a smaller shape less of the chest (160 mm hold the heart).

    Args:
        seed: non-negative seed of anatomy, motion, contrast and noise. The global generator is not touched.
        shape: rows and columns.
        n_slices: number of slices, base to apex.
        spacing: row, column and slice spacing in mm.
        group: ACDC disease group (a key of ``GROUPS``), or None to draw one from the seed.
        noise: standard deviation of the Rician noise's two channels, relative to the LV blood's signal.

    Raises:
        ValueError: if shape, n_slices or spacing is not positive, noise is negative or the group is unknown.
    """

    seed: int = 0
    shape: tuple[int, int] = (216, 256)
    n_slices: int = 10
    spacing: tuple[float, float, float] = (1.5625, 1.5625, 10.0)
    group: str | None = None
    noise: float = 0.02

    def __post_init__(self):
        if min(*self.shape, self.n_slices, *self.spacing) <= 0 or self.noise < 0:
            raise ValueError(
                f"shape {self.shape}, n_slices {self.n_slices} and spacing {self.spacing} must be positive, "
                f"noise {self.noise} not negative."
            )
        if self.group is not None and self.group not in GROUPS:
            raise ValueError(f"group {self.group!r} is unknown; choose one of {sorted(GROUPS)} or None.")

    @cached_property
    def anatomy(self) -> SimpleNamespace:
        """The drawn parameters (mm, mm^3, radians, fractions); ``ejection`` is the LV's ejection fraction."""
        rng = np.random.default_rng(self.seed)
        group = self.group or str(rng.choice(list(GROUPS)))
        a = SimpleNamespace(group=group, **{key: rng.uniform(*limits) for key, limits in GROUPS[group].items()})
        a.length = rng.uniform(68, 84)
        a.shortening = rng.uniform(0.1, 0.2) * a.ejection
        a.rv_angle = math.radians(rng.normal(-66, 10))  # around the LV's center, from columns to rows
        a.rv_width = math.radians(rng.uniform(56, 68))
        a.oval, a.oval_angle = rng.uniform(0.0, 0.05), rng.uniform(0, math.pi)
        a.tilt = rng.normal((-8, -7), 4).tolist()  # columns, rows: drift of the LV's center from base to apex
        a.center = rng.normal((-3, 6), (8, 6)).clip((-14, -4), (10, 14)).tolist()  # columns, rows
        a.rotation = rng.normal(0, 0.06)
        a.blood, a.rv_blood = rng.uniform(0.88, 1.08), rng.uniform(0.72, 0.88)
        a.muscle, a.fat = rng.uniform(0.25, 0.38), rng.uniform(0.8, 1.15)
        a.papillary = rng.uniform(3.5, 5.5, 2).tolist()
        a.chest = rng.uniform((190, 115), (220, 130)).tolist()  # half-axes
        a.fat_depth = rng.uniform(8, 24)
        a.blur = rng.uniform(0.5, 0.9)

        base_radius, a.apical_wall = a.lv_radius / math.sqrt(1 - 0.5**TAPER), 0.8 * a.wall
        a.lv_volume = FILLING * math.pi * base_radius**2 * (a.length - a.apical_wall)
        a.muscle_volume = FILLING * math.pi * (base_radius + a.wall) ** 2 * a.length - a.lv_volume
        return a

    @cached_property
    def _grid(self):
        """Columns x, rows y, slices z in mm from the LV's center; each slice's breath-hold shifts it."""
        a, rng = self.anatomy, np.random.default_rng((self.seed, 1))
        shift = rng.normal(0, 1.2, (self.n_slices, 2)).clip(-3, 3).astype(np.float32)
        axes = zip((*self.shape, self.n_slices), self.spacing, strict=True)
        y, x, z = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * spacing for n, spacing in axes)
        x, y = x[None, :, None] - a.center[0] - shift[:, 0], y[:, None, None] - a.center[1] - shift[:, 1]
        c, s = math.cos(a.rotation), math.sin(a.rotation)
        return c * x + s * y, c * y - s * x, z

    @cached_property
    def _textures(self):
        rng = np.random.default_rng((self.seed, 2))
        return SimpleNamespace(**{f"mm{scale}": self._texture(rng, scale) for scale in (2, 4, 9, 25, 60)})

    def _texture(self, rng, scale):
        """Smooth noise (H, W, D) of unit variance and a correlation length in mm, from a random lattice."""
        weights = []
        for n, spacing in zip((*self.shape, self.n_slices), self.spacing, strict=True):
            position = np.arange(n)[:, None] * spacing / max(scale, spacing)
            lattice = np.arange(-1, position.max() + 3)
            weights.append(np.exp(-((position - lattice) ** 2)).astype(np.float32))
        noise = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
        texture = np.einsum("ai,bj,ck,ijk->abc", *weights, noise, optimize=True)
        return texture / texture.std()

    @cached_property
    def _chest(self):
        """The resting surroundings (H, W, D): air, fat, chest wall, lung, liver, abdomen, aorta."""
        a, (x, y, z), t = self.anatomy, self._grid, self._textures
        apical = z / a.length + 0.5  # 0 at the base, 1 at the apex
        left = np.clip(-(x - 20) / a.chest[0], 0, 2)
        u = (x - 45) / (a.chest[0] + 45 - 40 * np.clip(apical, 0, 1))
        v = (y - 29 - 22 * left + 3 * t.mm25) / a.chest[1]
        depth = (1 - (np.abs(u) ** 2.3 + np.abs(v) ** 2.3) ** (1 / 2.3)) * a.chest[1]
        fat_depth = a.fat_depth * (0.8 + 0.8 * left * np.clip(apical + 0.5, 0, 1.3)) + 2 * t.mm25
        cavity = _cover(fat_depth + 12 + 3 * t.mm9 + 8 * _cover(40 - y, 40) - depth)
        diaphragm = 38 - 15 * apical + 4 * t.mm25 - np.clip(y - 25, 0, 60) * (0.15 + 0.6 * apical)
        abdomen = cavity * _cover(diaphragm - x, 3)
        aorta = np.hypot(x - 40 + 8 * apical, y - 52) - 10.5

        image = np.full(depth.shape, 0.01, np.float32)
        _paint(image, _cover(-depth), a.fat * (0.85 + 0.25 * t.mm60 + 0.05 * t.mm9))
        wall = 0.3 + 0.1 * t.mm4 + 0.4 * a.fat * np.clip(2 * t.mm9 - 1, 0, 1)
        _paint(image, _cover(fat_depth - depth), wall)
        _paint(image, cavity, 0.09 + 0.015 * t.mm4 + 0.5 * np.clip(t.mm2 - 2.2, 0, 1))
        _paint(image, abdomen, 0.34 + 0.03 * t.mm4 + 0.5 * np.clip(t.mm4 - 2.3, 0, 1))
        bowel = 0.34 + 0.1 * t.mm4 + 0.7 * a.fat * np.clip(1.5 * t.mm9 + t.mm25 - 0.9, 0, 1)
        _paint(image, abdomen * _cover(26 + 8 * t.mm25 - y, 4), bowel)
        _paint(image, _cover(aorta - 2), 0.25)
        _paint(image, _cover(aorta), a.blood + 0.05 * t.mm9)
        return image

    def _heart(self, phase):
        """The heart's surfaces at a phase, as radii (mm) around the LV's long axis, (H, W, D).

        The cavity's volume follows the contraction, the muscle's is constant: the wall thickens as the cavity
        empties. The apex rests, the base descends.
        """
        a, (x, y, z), squeeze = self.anatomy, self._grid, contraction(phase)
        length = a.length * (1 - a.shortening * squeeze)
        g = SimpleNamespace(squeeze=squeeze, x=x - a.tilt[0] * z / a.length, y=y - a.tilt[1] * z / a.length)
        g.depth = (z + length - a.length / 2) / length  # 0 at the base plane, 1 at the apex
        g.radius, angle = np.hypot(g.x, g.y), np.arctan2(g.y, g.x)
        oval = 1 + a.oval * np.cos(2 * (angle - a.oval_angle))
        volume = a.lv_volume * (1 - a.ejection * squeeze)
        g.lv = oval * _radius(volume, length - a.apical_wall * (1 + 0.4 * squeeze), g.depth * length)
        g.epicardium = oval * _radius(volume + a.muscle_volume, length, g.depth * length)

        turn = math.pi - np.abs(np.abs(angle - a.rv_angle) % (2 * math.pi) - math.pi)
        g.turn = turn / a.rv_width  # 1 where the RV inserts, at the base
        profile = np.sqrt(1 - (np.clip(g.depth, 0, 0.92) / 0.92) ** 3)
        crescent = np.cos(math.pi / 2 * np.clip(g.turn / (0.7 + 0.3 * profile), 0, 1)).clip(0) ** 0.6
        g.rv_depth = a.rv_depth * (1 - 0.55 * a.ejection * squeeze) * profile * crescent
        g.rv = g.epicardium + g.rv_depth
        return g

    def frame(self, phase: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """One cardiac phase.

        Args:
            phase: position in the cardiac cycle, in [0, 1): 0 is end-diastole, ``ES_PHASE`` end-systole.

        Returns:
            image: (H, W, D) float32 of non-negative whole numbers, as a scanner stores them.
            labels: (H, W, D) uint8: 0 background, 1 RV cavity, 2 LVM, 3 LV cavity with its papillary muscles.

        Raises:
            ValueError: if the phase is not in [0, 1).
        """
        if not 0 <= phase < 1:
            raise ValueError(f"phase {phase} has to be in [0, 1); end-diastole is 0.")
        g = self._heart(phase)
        labels = np.zeros(g.radius.shape, np.uint8)
        labels[(g.radius <= g.rv) & (g.rv_depth > 2)] = 1
        labels[g.radius <= g.epicardium] = 2
        labels[g.radius <= g.lv] = 3
        labels *= (g.depth >= 0) & (g.depth < 1)

        image = self._chest.copy()
        self._paint_ventricles(image, g)
        self._paint_atria(image, g)
        return self._acquire(image, phase), labels

    def cine(self, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels (H, W, D, T) of evenly spaced phases, end-diastole first; see :meth:`frame`."""
        frames = [self.frame(t / n_frames) for t in range(n_frames)]
        return tuple(np.stack(part, axis=-1) for part in zip(*frames, strict=True))

    def _paint_ventricles(self, image, g):
        """Epicardial fat, muscle, RV and LV blood, trabeculae and papillary muscles."""
        a, t, inside = self.anatomy, self._textures, (g.depth >= 0).astype(np.float32)
        muscle = a.muscle + 0.04 * t.mm2 + 0.04 * t.mm9
        blood = a.blood * (1 + 0.07 * t.mm9 + 0.04 * t.mm4)
        surface = g.rv + 3 * (g.rv_depth > 1)  # the RV's wall is thin
        fat = 1.0 + 2 * t.mm9 + 8 * np.clip(g.depth - 0.6, 0, 1) + 4 * (np.abs(g.turn - 1) < 0.2)
        fat = _cover(g.radius - surface - np.clip(fat, 0, 9)) * (g.depth < 1.12)
        _paint(image, fat, a.fat * (0.75 + 0.1 * t.mm4))
        _paint(image, _cover(g.radius - surface) * inside, muscle)

        trabeculae = np.clip(t.mm4 - 1.2 + g.depth, 0, 1)
        rv = _cover(np.maximum(g.radius - g.rv, g.epicardium - g.radius)) * inside * (g.rv_depth > 1)
        _paint(image, rv, a.rv_blood * blood * (1 - 0.6 * trabeculae))
        edge = 1.5 + 0.25 * self.spacing[2] * np.clip(g.depth - 0.5, 0, 0.5)  # a thick slice blurs the taper
        _paint(image, _cover(g.radius - g.lv, edge) * inside, blood)

        within = inside * (g.radius < g.lv)
        rim = _cover(g.lv - 4 - 2 * g.squeeze * (g.depth > 0.1) - g.radius, 6)
        _paint(image, 0.8 * within * rim * np.clip(t.mm4 + 0.6 * t.mm2 + 0.2, 0, 1), muscle)
        for size, angle in zip(a.papillary, (a.rv_angle + 2.0, a.rv_angle - 2.1), strict=True):
            reach = size * np.sqrt(np.clip(1 - np.abs(g.depth - 0.5) / 0.35, 0, 1))
            away = np.hypot(g.x - 0.7 * g.lv * math.cos(angle), g.y - 0.7 * g.lv * math.sin(angle)) + 1.2 * t.mm4
            _paint(image, within * _cover(away - reach) * (reach > 0.5), muscle)

    def _paint_atria(self, image, g):
        """Above the base plane: atria, aortic root and outflow tract, bright, thin-walled, never labeled."""
        a, t, above = self.anatomy, self._textures, g.depth < 0
        angle, size = a.rv_angle + math.radians(66), (a.lv_radius + a.wall) / 33
        along = (math.cos(angle) * g.x + math.sin(angle) * g.y) / size
        across = (math.cos(angle) * g.y - math.sin(angle) * g.x) / size
        chambers = ((2, 21, 23), (-1, -11, 13), (32, -8, 21), (4, -41, 19))  # LA, aorta, RA, RV outflow tract
        distances = [size * (np.hypot(along - u, across - v) - r) + 2 * t.mm9 for u, v, r in chambers]
        _paint(image, _cover(np.minimum.reduce(distances) - 3) * above, 0.35)
        for distance in distances:
            _paint(image, _cover(distance) * above, a.blood * (0.9 + 0.06 * t.mm9 + 0.03 * t.mm4))

    def _acquire(self, image, phase):
        """Coil sensitivity, point spread (in mm, in plane), Rician noise, and the scanner's whole numbers."""
        x, y, _ = self._grid
        image = image * (0.85 + 0.2 * (y / 120) ** 2 - 0.0006 * y - 0.0004 * x)
        image = ndimage.gaussian_filter(image, (*(self.anatomy.blur / s for s in self.spacing[:2]), 0))
        rng = np.random.default_rng((self.seed, 3, round(phase * 1e6)))
        noise = self.noise * self.anatomy.blood * rng.standard_normal((2, *image.shape), dtype=np.float32)
        return np.rint(300 * np.hypot(image + noise[0], noise[1])).astype(np.float32)


def contraction(phase: float) -> float:
    """Degree of contraction at a phase in [0, 1): 0 at end-diastole, 1 at end-systole; smooth, periodic."""
    return math.sin(math.pi * phase ** (math.log(0.5) / math.log(ES_PHASE))) ** 2


def _radius(volume, length, depth):
    """Radius (mm) at a depth (mm) below the base of a tapering body of this volume (mm^3) and length (mm)."""
    base = math.sqrt(volume / (FILLING * math.pi * length))
    return base * np.sqrt(1 - np.clip(depth / length, 0, 1) ** TAPER)


def _cover(distance, width=1.5):
    """Share of a voxel, 0 to 1, inside a boundary at a signed distance in mm (negative inside)."""
    return np.clip(0.5 - distance / width, 0, 1)


def _paint(image, cover, value):
    image += cover * (value - image)


def write_phantom(
    directory: Path | str,
    name: str,
    phantom: ShortAxisPhantom,
    phases: dict[str, float] | None = None,
    cine_frames: int = 0,
    with_labels: bool = True,
) -> dict[str, Path]:
    """Write a phantom as NIfTI with its spacing in the affine (sform code 1) and in pixdim.

    Args:
        directory: folder to write to; made if it is not there.
        name: start of the file names.
        phantom: what to write.
        phases: end of the file name to cardiac phase in [0, 1); by default ``{"ed": 0, "es": ES_PHASE}``.
        cine_frames: if positive, a 4-D cine ``4d`` (H, W, D, T) of so many phases is written as well.
        with_labels: whether to write the labels of every image, the cine included, as ``<end>_gt``.

    Returns:
        The files by their names' ends: ``{"ed": <directory>/<name>_ed.nii.gz, "ed_gt": ..., "es": ...}``.

    Raises:
        ValueError: if a phase is not in [0, 1).
    """
    phases = {"ed": 0.0, "es": ES_PHASE} if phases is None else phases
    pairs = {end: phantom.frame(phase) for end, phase in phases.items()}
    if cine_frames > 0:
        pairs["4d"] = phantom.cine(cine_frames)
    volumes = {end: image for end, (image, _) in pairs.items()}
    if with_labels:
        volumes |= {f"{end}_gt": labels for end, (_, labels) in pairs.items()}
    affine = np.diag([-phantom.spacing[0], -phantom.spacing[1], phantom.spacing[2], 1])
    paths = {end: Path(directory) / f"{name}_{end}.nii.gz" for end in volumes}
    for end, path in paths.items():
        _save(path, volumes[end], phantom.spacing, affine, sform_code=1)
    return paths


def write_acdc_like(
    directory: Path | str,
    n_patients: int,
    shape: tuple[int, int] = (64, 72),
    n_slices: int = 4,
    spacing: tuple[float, float, float] = (2.5, 2.5, 20.0),
    n_frames: int = 30,
    seed: int = 0,
    with_cine: bool = False,
) -> list[Path]:
    """Write phantoms in ACDC's layout: ``patientNNN/patientNNN_frameFF.nii.gz``, ``_gt`` and ``Info.cfg``.

    The headers have ACDC's trap as well: spacing in pixdim only, affine diag(-1, -1, 1), sform code 2.

    Args:
        directory: folder of the patients' folders, as ACDC's ``training``.
        n_patients: number of patients, from patient001; their groups go round ``GROUPS``.
        shape: rows and columns; the default holds the heart and little else, for fast tests.
        n_slices: number of slices.
        spacing: row, column and slice spacing in mm.
        n_frames: phases of the cine; frame 1 is end-diastole, the one nearest to ``ES_PHASE`` end-systole.
        seed: the first patient's seed; the others count up from it.
        with_cine: whether to write ``patientNNN_4d.nii.gz`` (H, W, D, T) as well.

    Returns:
        The patients' folders, in order.

    Raises:
        ValueError: if n_frames is less than 3, too few for an end-systole.
    """
    if n_frames < 3:
        raise ValueError(f"n_frames {n_frames} has no end-systole; use at least 3.")
    header, es = (spacing, np.diag([-1, -1, 1, 1]), 2), round(ES_PHASE * n_frames)
    folders = [Path(directory) / f"patient{i + 1:03d}" for i in range(n_patients)]
    for i, folder in enumerate(folders):
        phantom = ShortAxisPhantom(seed + i, shape, n_slices, spacing, group=list(GROUPS)[i % len(GROUPS)])
        for frame in (0, es):
            image, labels = phantom.frame(frame / n_frames)
            _save(folder / f"{folder.name}_frame{frame + 1:02d}.nii.gz", image, *header)
            _save(folder / f"{folder.name}_frame{frame + 1:02d}_gt.nii.gz", labels, *header)
        if with_cine:
            _save(folder / f"{folder.name}_4d.nii.gz", phantom.cine(n_frames)[0], *header)
        height, weight = np.random.default_rng((seed + i, 4)).integers((150, 50), (195, 110)).astype(float)
        info = f"ED: 1\nES: {es + 1}\nGroup: {phantom.group}\nHeight: {height}\n"
        (folder / "Info.cfg").write_text(f"{info}NbFrame: {n_frames}\nWeight: {weight}\n")
    return folders


def _save(path, array, spacing, affine, sform_code):
    nifti = nib.Nifti1Image(array.astype(np.int16 if array.dtype == np.float32 else array.dtype), affine)
    nifti.set_sform(affine, code=sform_code)
    nifti.set_qform(None, code=0)
    nifti.header.set_zooms((*spacing, 1.0)[: array.ndim])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nifti, path)
