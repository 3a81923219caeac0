"""Checkpoints of the Hugging Face hub: where the hub's client keeps them, and what describes them.

The layout of its cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from samullm_plugin.checkpoints.weight_files import weight_files
from samullm_plugin.errors import InputError

logger = logging.getLogger(__name__)

_DESCRIBING = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATIENCE_S = 10.0


def is_hub_id(reference: str) -> bool:
    """Return whether a reference can be a repository of the hub: ``organisation/name``."""
    return _ID.fullmatch(reference) is not None


def snapshot(reference: str, revision: str = "main") -> Path | None:
    """Return the folder of a revision that was downloaded before, as vLLM would find it.

    Args:
        reference: hub id.
        revision: branch, tag or commit.

    Returns:
        None if the reference is no hub id, or its ``config.json`` was not downloaded.
    """
    if not is_hub_id(reference):
        return None
    repository = hub_cache() / f"models--{reference.replace('/', '--')}"
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def is_snapshot(folder: Path) -> bool:
    """Return whether a folder is one that the hub's client keeps."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds a model's weights, all files of its index included."""
    try:
        files = weight_files(folder)[0]
    except InputError:  # whoever reads the weights says what is wrong with it
        return False
    return bool(files) and all(file.is_file() for file in files)


def can_download() -> bool:
    """Return whether the hub's client is installed and may use the network."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    return not constants.HF_HUB_OFFLINE


def fetch_description(reference: str, revision: str = "main") -> Path | None:
    """Download what describes a checkpoint, all but its weights, into the hub's cache.

    Args:
        reference: hub id.
        revision: branch, tag or commit.

    Returns:
        Its folder; None if the hub's client is not installed or told to stay offline.

    Raises:
        InputError: if the hub has no such model, wants a token for it, or cannot be reached.
    """
    if not is_hub_id(reference) or not can_download():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    logger.info("%s: its description is read from the hub", reference)
    try:
        folder = snapshot_download(
            reference, revision=revision, allow_patterns=_DESCRIBING, etag_timeout=_PATIENCE_S
        )
    except GatedRepoError as error:
        raise InputError(
            f"{reference} is gated on the hub; accept its terms there and set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{reference} is not on this machine and the hub cannot be reached; download it, or "
            "give the folder of its files as path"
        ) from error
    except Exception as error:  # the hub's client names no common base of what it raises
        said = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise InputError(f"{reference} cannot be read from the hub: {said}") from error
    return snapshot(reference, revision) or Path(folder)


def hub_cache() -> Path:
    """Return the folder in which the hub's client keeps models."""
    given = os.environ.get
    root = given("XDG_CACHE_HOME") or "~/.cache"
    home = given("HF_HOME") or f"{root}/huggingface"
    cache = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(cache)).expanduser()
