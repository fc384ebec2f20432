"""Fixtures shared by all tests: offline, one thread, small random models.

Knows nothing about any one area of the library; helpers to import by hand are in tiny.py beside this file.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from stock_faults import faults
from tiny import tiny_llava, tiny_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

if TYPE_CHECKING:
    from small_run import SmallRun


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what the installed transformers gets wrong itself."""
    for fault in faults():
        for item in items:
            if re.search(fault.tests, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=f"stock transformers: {fault.reason}"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_stored_checks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `thinsight check` stored on this machine lets no model run here."""
    monkeypatch.setenv("THINSIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "no-checks"))


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A fresh random LLaVA with sdpa attention, 4 decoder layers, 16 vision tokens."""
    return tiny_llava()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A small random model in a folder, with sets to calibrate and to test on."""
    from small_run import make_small_run  # which the environments of vLLM and of harnesses need not import

    return make_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """A processor that fits `llava`, with a word-level tokenizer built in memory."""
    return tiny_processor()
