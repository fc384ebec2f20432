"""Counters of the running reduction on vLLM's own /metrics.

The engine runs in processes of its own, so what they count goes through files that prometheus_client maps into memory,
as it does itself for servers of several processes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache

from ..counters import HELP
from ..counters import KEPT as KEPT
from ..counters import REDUCED as REDUCED
from ..counters import SEEN as SEEN
from ..counters import WHOLE as WHOLE

FOLDER = "THINSIGHT_VLLM_METRICS"
"""The environment variable that names the folder of these files, for the processes that vLLM starts."""


@cache
def publish() -> None:
    """In the process that serves /metrics: show what the engine's processes count."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return  # several API servers: vLLM collects that folder itself
    folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="thinsight-metrics-")
    owner = os.getpid()

    def clear() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clear)
    MultiProcessCollector(REGISTRY, path=folder)


class Tally:
    """Counts of one process, kept where the process that serves /metrics reads them."""

    def __init__(self) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(FOLDER)
        self._values: dict[str, float] = {}
        path = None if folder is None else os.path.join(folder, f"counter_thinsight-{os.getpid()}.db")
        self._file = None if path is None else MmapedDict(path)

    def add(self, name: str, amount: int, **labels: str) -> None:
        """Count so many more."""
        from prometheus_client.mmap_dict import mmap_key

        key = mmap_key(name, f"{name}_total", [*labels], [*labels.values()], HELP[name])
        self._values[key] = self._values.get(key, 0.0) + amount
        if self._file is not None:
            self._file.write_value(key, self._values[key], 0.0)
