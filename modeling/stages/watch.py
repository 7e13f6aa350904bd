"""Stage `watch`: what DVC compares, in every run, to see whether the user's own files have changed.

Names, sizes and times of change: to hash 200,000 files would take minutes in every run. It imports no torch.
"""

import hashlib
from pathlib import Path

from modeling.data.folder import listing
from modeling.reliability.errors import require
from modeling.reliability.files import existing, write_atomic
from modeling.settings.groups import Config
from modeling.settings.keys import own_keys


def run(config: Config, out: Path) -> None:
    """Writes data/<data.after> under `out`: another content if there are other files."""
    keys = own_keys(config.data)
    require("path" in keys, "stage", "watch", f"data={config.data.name} has no files of yours to look at")
    found = listing(existing("data.path", keys["path"]))
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    write_atomic(out / "data" / config.data.after, f"{len(found)} files, {digest}\n".encode())
