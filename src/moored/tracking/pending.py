"""What may wait without holding up the metrics: artifacts, the parent, the model registry.

When it is tried, and how often, is `shipper.py`'s matter; where it is kept, `cursor.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moored.tracking.cursor import parent_of
from moored.tracking.store import RejectedError, Store, inside

Item = dict[str, str]


def items_of(record: dict[str, Any], first_config: str | None) -> Iterator[Item]:
    """What an event asks for that may wait.

    Args:
        record: the event.
        first_config: the recipe of the first attempt; another attempt's is kept beside it.

    Raises:
        KeyError: the event lacks a field.
    """
    event, fields = record["event"], record["fields"]
    if event == "start":
        if text := fields.get("config"):
            name = "config" if text == first_config else f"config-attempt-{record['attempt']}"
            yield {"text": str(text), "name": f"{name}.yaml"}
        if fields.get("parent"):
            yield {"parent": str(fields["parent"])}
    elif event == "artifact":
        yield {"path": str(fields["path"]), "folder": str(fields.get("folder", ""))}
    elif event == "register":
        yield {"register": str(fields["name"]), "folder": str(fields["folder"])}


def send_all(
    items: Sequence[Item],
    store: Store,
    run_id: str,
    *,
    run_dir: Path,
    parent_run: Callable[[Path], str | None],
    refused: Callable[[str], None],
    failed: Callable[[str], None],
) -> tuple[list[Item], int]:
    """Bring items into the store, as far as it can be done now.

    Args:
        items: of `items_of`, in order.
        store: where to.
        run_id: the run in the store.
        run_dir: the run directory.
        parent_run: from a run directory to its run in the store, None while it has none.
        refused: told of each item that will never get there.
        failed: told of each that may another time.

    Returns:
        What is left for another time, and how many files or folders were sent.
    """
    left: list[Item] = []
    num_sent = 0
    for item in items:
        kind = next(kind for kind in ("path", "name", "parent", "register") if kind in item)
        named = f"{kind} {item[kind]}" if kind in ("parent", "register") else item[kind]
        try:
            if kind == "path":
                store.upload(run_id, inside(run_dir, item["path"]), item["folder"])
            elif kind == "name":
                store.upload_text(run_id, item["text"], item["name"])
            elif kind == "register":
                if any(other.get("folder") == item["folder"] for other in left):
                    left.append(item)  # not before its files
                    continue
                store.register(run_id, item["register"], item["folder"])
            elif not (parent := parent_of(run_dir, item["parent"])).is_dir():
                raise RejectedError("its run directory is gone")
            elif parent_id := parent_run(parent):
                store.link_parent(run_id, parent_id)
            else:
                left.append(item)
                continue
            num_sent += kind in ("path", "name")
        except RejectedError as error:
            refused(f"{named}: {error}")
        except Exception as error:
            left.append(item)
            failed(f"{named}: {type(error).__name__}: {error}")
    return left, num_sent
