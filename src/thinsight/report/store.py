"""A report's data on disk: `report.json` and a folder of picture files beside it.

Knows nothing about how a report looks. A report.json is either the old one or the new one: pictures are named
by what is in them, so that a new report never writes over those of an old one.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadInput, StorageError
from ..records import read_sealed, seal, user_path, write_atomically
from .data import ReportData

DATA_FILE = "report.json"
PICTURE_FOLDER = "report_pictures"
_REMEDY = "write the report anew"


def save_report_data(folder: str | Path, data: ReportData) -> Path:
    """Writes `report.json` and its pictures (lossless PNG) into `folder`; returns the JSON's path.

    Raises:
        ThinsightError: the folder or a file cannot be written.
    """
    folder = user_path(folder, "folder")
    pictures = folder / PICTURE_FOLDER
    names: list[str] = []

    def save_image(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        names.append(f"picture-{len(names):03d}-{_digest(buffer.getvalue())}.png")
        write_atomically(pictures / names[-1], buffer.getvalue())
        return names[-1]

    record = seal(data.to_dict(save_image))
    write_atomically(folder / DATA_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
    for old in pictures.glob("picture-*.png"):
        if old.name not in names:
            with suppress(OSError):  # it does no harm
                old.unlink()
    return folder / DATA_FILE


def load_report_data(folder: str | Path) -> ReportData:
    """Reads what `save_report_data` wrote.

    Raises:
        ThinsightError: no report.json there, one that is no JSON, was changed or breaks the schema, or a
            picture file that is missing or was changed.
    """
    folder = user_path(folder, "folder")
    path = folder / DATA_FILE
    if not path.exists():
        raise BadInput(f"no {DATA_FILE} in {folder}; name a folder that `thinsight search` wrote")

    def load_image(name: Any) -> Image.Image:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise StorageError(f"{path}: picture name {name!r} is not a plain file name; {_REMEDY}")
        file = folder / PICTURE_FOLDER / name
        try:
            data = file.read_bytes()
            if not name.endswith(f"-{_digest(data)}.png"):
                raise ValueError
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            raise StorageError(f"cannot read picture {file}: missing or damaged; {_REMEDY}") from None

    return ReportData.from_dict(read_sealed(path, _REMEDY), load_image, str(path), _REMEDY)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
