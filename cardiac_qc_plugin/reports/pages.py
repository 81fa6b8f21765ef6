"""How the reports' pages are rendered: Jinja2 templates, with style and scripts inside, and nothing from elsewhere."""

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .pictures import MAP_TOP, map_hex

__all__ = ["CONTOURS", "made_with", "render"]

# Color and dashes (points on, off) of each class's contour; the colors stay apart for the color-blind
CONTOURS = {"RV": ("#56B4E9", (6, 2.5)), "LVM": ("#F0E442", ()), "LV": ("#00D9A3", (2, 2))}
STRUCTURES = {"RV": "right ventricle (RV)", "LVM": "left-ventricular myocardium (LVM)", "LV": "left ventricle (LV)"}
FLAG_COLOR = "#FF5A36"
SCRIPTS = (*(f"assets/{name}.js" for name in ("shared", "case", "cohort", "curve")), "vendor/uplot/uPlot.iife.min.js")


def asset(name: str) -> Markup:
    """A file of the package as it is, to stand between the tags of a script or style."""
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def content_policy() -> str:
    """What a page may do: run its own scripts, and load nothing. So no file's name can become a script."""
    hashes = (b64encode(hashlib.sha256(asset(name).encode()).digest()).decode() for name in SCRIPTS)
    scripts = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {scripts}"
    )


@cache
def environment() -> Environment:
    env = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    env.filters["number"] = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    env.filters["interval"] = lambda ends: f"{ends[0]:.1f} to {ends[1]:.1f}"
    env.globals |= {
        "asset": cache(asset),
        "content_policy": content_policy(),
        "contours": CONTOURS,
        "structures": STRUCTURES,
        "flag_color": FLAG_COLOR,
        "map_colors": map_hex(),
        "map_top": MAP_TOP,
    }
    return env


def render(template: str, **values: Any) -> str:
    """A page, or a part of one, everything in it escaped."""
    return environment().get_template(template).render(values)


@cache
def made_with() -> str:
    """Digest of the templates, styles and scripts: pages made with others are out of date."""
    folder = files(__package__)
    parts = (
        path for name in ("templates", "assets", ".") for path in folder.joinpath(name).iterdir() if path.is_file()
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(parts, key=str))).hexdigest()
