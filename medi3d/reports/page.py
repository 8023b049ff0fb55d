"""Self-contained HTML pages: one stylesheet for every report."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from medi3d.files import writing, written_aside

MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}


def embedded(picture: Path) -> str:
    """A PNG or SVG as a data URI."""
    return f"data:{MEDIA[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Render a template to a page; each template extends `page.html`."""
    environment = Environment(
        loader=PackageLoader("medi3d.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = embedded
    page = environment.get_template(template).render(**content)
    with writing(path), written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path
