"""What the tests of sweeps share."""

from pathlib import Path
from typing import Any

import yaml


def write_sweep(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump({"config": "tiny.yaml", "seeds": [0], **settings}, sort_keys=False))
    return path
