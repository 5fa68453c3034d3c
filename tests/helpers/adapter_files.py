"""The two files of an adapter folder, and changing one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_unsealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a config, and drop the record that would tell."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
