"""One frozen Config, resolved once: flag > environment > file > default.

Everything here is pure: what stands in flags, environment and file comes in as mappings, and
files are read through a function that the caller hands in. Every error names the value, the
source it came from, and what to write instead.
"""

from __future__ import annotations

from meshnode.config.named_files import split_tokens
from meshnode.config.resolution import resolve
from meshnode.config.settings import DEFAULT_API, DEFAULT_OPEN_NETWORK, Config, field_names
from meshnode.config.sources import PREFIX
from meshnode.config.together import check_together

__all__ = [
    "DEFAULT_API",
    "DEFAULT_OPEN_NETWORK",
    "PREFIX",
    "Config",
    "check_together",
    "field_names",
    "resolve",
    "split_tokens",
]
