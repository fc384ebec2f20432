"""What a search, an evaluation or a measurement found, as one HTML file, as terminal tables and as pictures.

Knows nothing about how the numbers were made; `data.py` holds them, and nothing here imports torch.
"""

from __future__ import annotations

from .data import (
    Consistency,
    DatasetInfo,
    Headline,
    Interval,
    MethodRow,
    ModelInfo,
    Picture,
    ReportData,
    SearchInfo,
    TaskRow,
    TimingRow,
    TrialRow,
)
from .html import render, write_report
from .pictures import check_picture_name, contact_strip, draw_kept, save_contact_strip
from .store import load_report_data, save_report_data
from .terminal import print_report

__all__ = [
    "Consistency",
    "DatasetInfo",
    "Headline",
    "Interval",
    "MethodRow",
    "ModelInfo",
    "Picture",
    "ReportData",
    "SearchInfo",
    "TaskRow",
    "TimingRow",
    "TrialRow",
    "check_picture_name",
    "contact_strip",
    "draw_kept",
    "load_report_data",
    "print_report",
    "render",
    "save_contact_strip",
    "save_report_data",
    "write_report",
]
