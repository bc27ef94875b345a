"""`davae push`: an exported folder to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from davae.errors import ModelError, RunError
from davae.pretrained.open import HUB_ID
from davae.publish.assemble import UPGRADE_FILE


def push(folder: Path, repo_id: str, *, public: bool = False, message: str | None = None) -> str:
    """Upload an exported folder to the hub and return its address.

    A new repository is private unless `public` is set.
    A repository that exists keeps its visibility.

    Raises:
        ModelError: not an exported folder, one with links to files elsewhere, or no hub id.
        RunError: no network, not logged in, or refused by the hub.
    """
    if not any((folder / name).is_file() for name in ("model_index.json", UPGRADE_FILE)):
        raise ModelError(
            f"{folder} has no model_index.json and no {UPGRADE_FILE}; give a folder that `davae export` wrote"
        )
    if (folder / "recipe.yaml").is_file():  # a run: its cache and checkpoints are nobody else's
        raise ModelError(f"{folder} is a run, with its data and checkpoints; give a folder that `davae export` wrote")
    check_links(folder)
    if "@" in repo_id or not HUB_ID.fullmatch(repo_id):
        raise ModelError(f"'{repo_id}' is not a hub id; it is ORGANISATION/NAME or USER/NAME")
    api = HfApi()
    try:
        where = api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message or f"Upload {folder.name} with davae"
        )
    except HFValidationError as error:
        raise ModelError(f"'{repo_id}' is not a hub id: {' '.join(str(error).split())[:160]}") from error
    except (
        HTTPError,
        OSError,
    ) as error:  # HTTPError of whatever client the hub's library uses; "not logged in" is an OSError
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"the hub did not take {folder}: {reason}; check the network and `hf auth login`") from error
    return str(where)


def check_links(folder: Path) -> None:
    """Refuse links in a folder that lead out of it: their targets would be uploaded.

    Raises:
        ModelError: names the link and where it leads.
    """
    home = Path(os.path.realpath(folder))
    for place, folders, names in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *names)):
            target = Path(os.path.realpath(path))
            if path.is_symlink() and home not in target.parents:
                raise ModelError(f"{path}: it is a link to {target}, outside of {folder}; remove it or copy the file")
