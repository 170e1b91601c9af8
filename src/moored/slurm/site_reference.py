"""The reference of site profiles, docs/site.md, written from `site.py`.

python -m moored.slurm.site_reference > docs/site.md
"""

from __future__ import annotations

from moored.config.recipe_reference import reference
from moored.slurm.site import Site

HEAD = """# Site profiles: every key

Written from the schema by `python -m moored.slurm.site_reference > docs/site.md`; a test holds it
true. A profile says how jobs are asked for on one cluster and what its nodes need; how it is
trained is the recipe's. Examples, one per kind of site, are in `slurm/sites`; `--site` takes a name
there or a path, and `--set slurm.partition=long` changes a key for one submission. Profiles are
strict, as recipes are. [slurm.md](slurm.md) is the guide.
"""


if __name__ == "__main__":
    print(reference(Site, HEAD), end="")
