"""The embedded models, which are inside the package.

`micro` is a small Stable Diffusion 3 that draws artwork. `clothing` is a small class-conditional LightningDiT that draws
photos of clothes. Each has an upgrade.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = {name: FOLDER / name / "base" for name in ("micro", "clothing")}
UPGRADES = {name: FOLDER / name / "upgrade" for name in MODELS}
SHIPPED = {f"{name}-upgraded": name for name in UPGRADES}  # names of embedded models with their upgrade applied


def resolve(model: str) -> str:
    """Return the embedded folder of `micro` or `clothing`, and every other name as it is.

    Other names are folders or ids of the hub.
    """
    return str(MODELS[model]) if model in MODELS else model


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the id and the revision of a hub model, from ID@REVISION.

    A revision is a branch, a tag or a commit; None is the newest state. A folder keeps its whole name.
    """
    name, _, revision = model.partition("@")
    return (model, None) if Path(model).is_dir() else (name, revision or None)


def resolve_upgrade(name: str) -> Path:
    """Return the embedded upgrade's folder of `micro-upgraded` or `clothing-upgraded`.

    Every other name is a folder.
    """
    return UPGRADES[SHIPPED[name]] if name in SHIPPED else Path(name)


def shipped_upgrade(model: str) -> Path | None:
    """Folder of the upgrade that ships with an embedded model, None for every other model."""
    return UPGRADES.get(model)
