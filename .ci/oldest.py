"""Prints, for pip, the oldest versions that pyproject.toml allows of the packages that trainers are made of."""

from packaging.version import Version

from tisdpo.doctor import requirements

for name in ("trl", "transformers", "accelerate", "peft"):
    bounds = [
        Version(bound.version) for needed in requirements() if needed.name == name for bound in needed.specifier if bound.operator == ">="
    ]
    print(f"{name}=={min(bounds)}.*")
