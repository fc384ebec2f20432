"""A report's data on disk: `report.json` and a folder of picture files beside it.

Knows nothing about how a report looks. Writing is atomic: a report.json is either the old one or the new one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import BadInput, StorageError
from .data import ReportData

DATA_FILE = "report.json"
PICTURE_FOLDER = "report_pictures"


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all, creating its folder.

    Raises:
        ThinsightError: the folder or the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write"
        ) from error


def save_report_data(folder: str | Path, data: ReportData) -> Path:
    """Writes `report.json` and its pictures (lossless PNG) into `folder`; returns the JSON's path."""
    folder = Path(folder)
    names: list[str] = []

    def save_image(image: Image.Image) -> str:
        name = f"picture-{len(names):03d}.png"
        path = folder / PICTURE_FOLDER / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(path)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}; choose a folder you may write"
            ) from error
        names.append(name)
        return name

    text = json.dumps(data.to_dict(save_image), indent=1, allow_nan=False)
    write_text(folder / DATA_FILE, text + "\n")
    return folder / DATA_FILE


def load_report_data(folder: str | Path) -> ReportData:
    """Reads what `save_report_data` wrote.

    Raises:
        ThinsightError: no report.json there, one that is no JSON or breaks the schema, or a bad picture file.
    """
    folder = Path(folder)
    path = folder / DATA_FILE

    def load_image(name: Any) -> Image.Image:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise StorageError(
                f"{path}: picture name {name!r} is not a plain file name; write the report anew"
            )
        file = folder / PICTURE_FOLDER / name
        try:
            with Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise StorageError(
                f"cannot read picture {file}: missing or damaged; write the report anew"
            ) from error

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no {DATA_FILE} in {folder}; name a folder that `thinsight search` wrote") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON ({error}); write the report anew") from error
    return ReportData.from_dict(value, load_image)
