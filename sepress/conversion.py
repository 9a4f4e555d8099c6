"""A model file of any origin -> one of ours, read back: what `sepress convert` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sepress.bundle import load_bundle, save_bundle
from sepress.errors import CheckError
from sepress.types import JSON, Bundle

SCHEMA = "sepress.convert/1"


@dataclass(frozen=True)
class Conversion:
    """What was written, and what was chosen on the way there."""

    path: Path
    bundle: Bundle
    arch: str | None  # the user's own factory, which the file needs again each time it is loaded

    @property
    def notes(self) -> list[str]:
        """What loading noted, in words."""
        noted = self.bundle.lineage.get("origin", {}).get("notes", ())
        again = f"each use of the file needs --arch {self.arch} again, since a file may not run your code"
        return [*noted, *([again] if self.arch else [])]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.bundle.net.parameters())

    def to_json(self) -> dict[str, JSON]:
        """What `sepress convert --json` prints."""
        spec = self.bundle.spec
        return {
            "schema": SCHEMA,
            "path": str(self.path),
            "reference": spec.reference,
            "kwargs": dict(spec.kwargs),
            "input_size": list(spec.preprocessing.input_size),
            "preprocessing": spec.preprocessing.origin,
            "parameters": self.parameters,
            "notes": self.notes,
        }

    def render(self) -> str:
        """A line on the net and one for each note."""
        spec = self.bundle.spec
        size = " x ".join(map(str, spec.preprocessing.input_size))
        arguments = "".join(f", {name}={value}" for name, value in spec.kwargs.items())
        first = f"{spec.reference}{arguments}: input {size}, {self.parameters:,} parameters"
        return "".join(f"{line}\n" for line in (first, *(f"  {note}" for note in self.notes)))


def convert_bundle(bundle: Bundle, path: Path) -> Conversion:
    """Save a bundle and read it back; raises CheckError, leaving no file, where it is not the same net."""
    save_bundle(bundle, path)
    arch = bundle.spec.reference if bundle.spec.source == "user" else None
    try:
        again, wanted = load_bundle(path, arch=arch).net.state_dict(), bundle.net.state_dict()
        same = again.keys() == wanted.keys() and all(
            torch.equal(again[name], wanted[name]) for name in wanted
        )
    except BaseException:
        path.unlink()
        raise
    if not same:
        path.unlink()
        raise CheckError(f"{path} does not give the net that was saved", remedy="Please report this net.")
    return Conversion(path, bundle, arch)


def default_path(source: str) -> Path:
    """`NAME-native.pt` in the current folder, for a file or a reference called NAME."""
    name = source.rpartition(":")[2] if not Path(source).is_file() else Path(source).name
    for suffix in (".tar", ".pth", ".pt", ".ckpt", ".bin", ".pkl", ".safetensors"):
        name = name.removesuffix(suffix)
    return Path(f"{name}-native.pt")
