"""The oldest versions that pyproject.toml allows of what trainers are made of: a list for pip, or with `check` whether it is them that run.

Not of datasets, of which TRL needs a newer one.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

needed = [Requirement(text) for text in metadata.requires("tisdpo")]
for name in ("trl", "transformers", "accelerate", "peft"):
    oldest = min(Version(bound.version) for r in needed if r.name == name for bound in r.specifier if bound.operator == ">=")
    if sys.argv[1:] == ["check"]:
        found = Version(metadata.version(name))
        assert found.release[:2] == oldest.release[:2], f"{name} {found} is imported, not {oldest}"
    else:
        print(f"{name}=={oldest}.*")
