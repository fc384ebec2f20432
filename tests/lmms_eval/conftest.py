"""What is held against lmms-eval is collected where lmms-eval is installed only."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("lmms_eval")  # its import would find this folder
    collect_ignore_glob: list[str] = []
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
