"""Lets a torchvision that was made for CUDA be imported beside a torch for CPUs: its two missing operators get names.

Of a test environment only: a package index for CPUs gives the right torchvision, others may not.
"""

import importlib.util
from pathlib import Path

MARK = "# named for thinsight's tests"
LINES = f"""
if not torchvision.extension._has_ops():  {MARK}
    _named = torch.library.Library("torchvision", "DEF")
    _named.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _named.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
AFTER = "import torchvision.extension  # noqa: F401\n"

if __name__ == "__main__":
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).with_name("_meta_registrations.py")
    text = path.read_text()
    if MARK not in text:
        path.write_text(text.replace(AFTER, AFTER + LINES, 1))
