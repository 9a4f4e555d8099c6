"""What an export consists of -> a short program beside it that needs onnxruntime, numpy and Pillow only.

Fixed text: names and figures of the model are read from its file when the program runs.
"""

from __future__ import annotations

_HEAD = '''\
"""Classify an image: python example.py IMAGE (needs onnxruntime, numpy and Pillow)."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

net = ort.InferenceSession(Path(__file__).with_name("{file}"), providers=["CPUExecutionProvider"])
about = net.get_modelmeta().custom_metadata_map
channels, height, width = json.loads(about["sepress.input_size"])
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("L" if channels == 1 else "RGB")
crop = 1 if image.size == (width, height) else float(about["sepress.crop_pct"])
scale = max(round(height / crop) / image.height, round(width / crop) / image.width)
size = [int(side * scale + 1e-6) for side in image.size]
image = image.resize(size, Image.Resampling[about["sepress.interpolation"].upper()])
left, top = round((image.width - width) / 2), round((image.height - height) / 2)
pixels = np.asarray(image)[top : top + height, left : left + width].reshape(1, height, width, channels)
'''
_INSIDE = """\
probabilities = net.run(None, {"image": pixels})[0][0]
"""
_OUTSIDE = """\
pixels = np.float32((pixels / 255 - json.loads(about["sepress.mean"])) / json.loads(about["sepress.std"]))
logits = net.run(None, {"input": pixels.transpose(0, 3, 1, 2)})[0][0]
probabilities = np.exp(logits - np.logaddexp.reduce(logits))
"""
_TAIL = """\
names = json.loads(about.get("sepress.class_names", "null")) or range(len(probabilities))
print(*(f"{probabilities[i]:.2%} {names[i]}" for i in probabilities.argsort()[::-1][:5]), sep="\\n")
"""


def example_code(*, inside: bool, batch: int | None) -> str:
    """The program for model.image.onnx where preprocessing is `inside`, else for model.onnx.

    It resizes and crops as data.transforms.Prepare does; a file of a fixed batch gets the image so often.
    """
    head = _HEAD.replace("{file}", "model.image.onnx" if inside else "model.onnx")
    repeated = "" if batch in (None, 1) else f"pixels = pixels.repeat({batch}, axis=0)  # so many at once\n"
    return head + repeated + (_INSIDE if inside else _OUTSIDE) + _TAIL
