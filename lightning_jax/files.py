"""Files that a kill at any moment leaves as they were or as they shall be."""

import os
from pathlib import Path
from typing import Literal


def replace_text(path: Path, text: str, *, errors: Literal["strict", "replace"] = "strict") -> None:
    """Writes a text file, in UTF-8, as a whole; what `errors` means is what it means to `str.encode`."""
    replacement = path.with_name(path.name + ".new")
    replacement.write_text(text, encoding="utf-8", errors=errors)
    os.replace(replacement, path)
