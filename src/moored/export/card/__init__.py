"""The forgetting card: what an adapter learned and forgot, and what it was made of.

`facts.py` is the card as data and JSON, `markdown.py` the same as a page with the hub's front
matter of `front_matter.py` (`markdown_escape.py` makes names harmless), `gather.py` reads a run and
a base for it, `card_files.py` writes both. Nothing is measured and no weights are loaded here.
"""

from moored.export.card.card_files import readme_of, write
from moored.export.card.facts import (
    Adapter,
    Card,
    Delta,
    Deltas,
    End,
    Figures,
    Merged,
    Provenance,
    Stops,
)
from moored.export.card.gather import (
    HASHED_BYTES,
    adapter_of,
    base_of,
    figures_for,
    of_run,
    public,
    utc,
)

__all__ = [
    "HASHED_BYTES",
    "Adapter",
    "Card",
    "Delta",
    "Deltas",
    "End",
    "Figures",
    "Merged",
    "Provenance",
    "Stops",
    "adapter_of",
    "base_of",
    "figures_for",
    "of_run",
    "public",
    "readme_of",
    "utc",
    "write",
]
