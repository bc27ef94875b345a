"""The embedded model `micro`: a small Stable Diffusion 3 and its shipped upgrade, inside the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = {"micro": FOLDER / "micro" / "base"}
UPGRADES = {"micro": FOLDER / "micro" / "upgrade"}
SHIPPED = {f"{name}-upgraded": name for name in UPGRADES}  # names of embedded models with their upgrade applied


def resolve(model: str) -> str:
    """`micro` -> the embedded diffusers folder; every other name is returned as it is (a folder or a hub id)."""
    return str(MODELS[model]) if model in MODELS else model


def resolve_upgrade(name: str) -> Path:
    """`micro-upgraded` -> the embedded upgrade's folder; every other name is a folder."""
    return UPGRADES[SHIPPED[name]] if name in SHIPPED else Path(name)


def shipped_upgrade(model: str) -> Path | None:
    """Folder of the upgrade that ships with an embedded model, None for every other model."""
    return UPGRADES.get(model)
