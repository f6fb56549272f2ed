"""Other programs that merge checkpoints, from PyPI, each in a throw-away folder of its own: installed without what would change this environment."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MECHA = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import sd_mecha
a, b = (sd_mecha.model(pathlib.Path(path)) for path in sys.argv[2:4])
sd_mecha.merge(sd_mecha.weighted_sum(a, b, alpha=0.5), output=pathlib.Path(sys.argv[4]))
"""
_MEH = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.cuda.memory_allocated = lambda *_: 0  # it asks even where there is no CUDA
from sd_meh.merge import merge_models, save_model
models = {"model_a": pathlib.Path(sys.argv[2]), "model_b": pathlib.Path(sys.argv[3])}
merged = merge_models(models, {"alpha": [0.5] * 25}, {"alpha": 0.5}, merge_mode="weighted_sum", precision=16)
save_model(merged, sys.argv[4].removesuffix(".safetensors"), "safetensors")
"""
_MERGEKIT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
out = pathlib.Path(sys.argv[4])
config = out.with_suffix(".yml")
config.write_text(
    "merge_method: linear\\ndtype: float32\\nout_dtype: float16\\nparameters: {weight: 0.5}\\n"
    f"models:\\n  - model: {sys.argv[2]}\\n  - model: {sys.argv[3]}\\n"
)
from mergekit.scripts.merge_raw_pytorch import main
main([str(config), str(out.with_suffix("")), "--safe-serialization"])
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """``packages``: what pip fetches, itself first; ``program``: takes its folder, two checkpoints and an output."""

    packages: tuple[str, ...]
    program: str

    def command(self, folder: Path, *files: Path) -> list[str | Path]:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *self.packages]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        return [sys.executable, "-c", self.program, folder, *files]


PEERS = {
    "sd_mecha": Peer(("sd-mecha==1.1.8", "fuzzywuzzy", "Levenshtein", "rapidfuzz", "networkx", "scipy"), _MECHA),
    "sd_meh": Peer(("sd-meh==0.9.5", "tensordict", "pyvers", "orjson", "cloudpickle", "scipy"), _MEH),
    "mergekit": Peer(
        ("mergekit==0.1.5", "immutables", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
        _MERGEKIT,
    ),
}
