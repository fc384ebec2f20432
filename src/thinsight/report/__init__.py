"""What a search, an evaluation or a measurement found, as one HTML file and as pictures.

Knows nothing about how the numbers were made; `data.py` holds them, `thinsight.tables` shows them in a terminal, and
nothing here imports torch.
"""

from __future__ import annotations

from .. import words
from .data import (
    DatasetInfo,
    FrontierRow,
    Headline,
    Interval,
    MethodRow,
    ModelInfo,
    Picture,
    ReportData,
    SearchInfo,
    TaskRow,
    load_report_data,
    save_report_data,
)
from .html import render, write_report
from .pictures import check_picture_name, contact_strip, draw_kept, save_contact_strip

__all__ = [
    "DatasetInfo",
    "FrontierRow",
    "Headline",
    "Interval",
    "MethodRow",
    "ModelInfo",
    "Picture",
    "ReportData",
    "SearchInfo",
    "TaskRow",
    "check_picture_name",
    "contact_strip",
    "draw_kept",
    "load_report_data",
    "render",
    "save_contact_strip",
    "save_report_data",
    "words",
    "write_report",
]
