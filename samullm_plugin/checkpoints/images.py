"""Tokens of images by a model's own processor, where it is on this machine."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Height and width in pixels."""


def is_image(part: object) -> bool:
    """Return whether a part of a message is an image."""
    return isinstance(part, Mapping) and part.get("type") in ("image_url", "input_image")


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the images of a conversation in their order."""
    contents = (m.get("content") for m in messages)
    return [p for content in contents if isinstance(content, list) for p in content if is_image(p)]


def with_marks(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation as chat templates are given it: marks where its images are."""
    return [
        {**m, "content": [{"type": "image"} if is_image(part) else part for part in content]}
        if isinstance(content := m.get("content"), list)
        else dict(m)
        for m in messages
    ]


def url_of(part: Mapping[str, Any]) -> str | None:
    """Return the URL of an image of a message, in either of the forms that chats have."""
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    return url if isinstance(url, str) else None


def file_of(url: str) -> Path | None:
    """Return the file that a URL names; None: it names none."""
    return Path(unquote(urlparse(url).path)) if url.startswith("file://") else None


def size_of(part: Mapping[str, Any]) -> Size | None:
    """Return the size of an image of a message; None: it is not here, or cannot be read."""
    url = url_of(part)
    if url is None or find_spec("PIL") is None:
        return None
    from PIL import Image

    try:
        if (path := file_of(url)) is not None:
            opened = Image.open(path)
        elif url.startswith("data:"):
            opened = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
        else:
            return None
        with opened:
            return opened.height, opened.width
    except (OSError, binascii.Error, ValueError) as error:  # the engine says what is wrong with it
        logger.info("the size of an image cannot be read: %s", error)
        return None


def image_tokens(
    folder: Path | None, sizes: Sequence[Size], options: Mapping[str, Any]
) -> list[int] | None:
    """Return the tokens that stand for images in a prompt, as transformers' processors tell it.

    Engines count by the same processors.

    Args:
        folder: of the model.
        sizes: of the images.
        options: of the processor (``mm_processor_kwargs``).

    Returns:
        None if there is no processor here, or it does not tell.
    """
    if folder is None or not folder.is_dir() or find_spec("transformers") is None:
        return None
    try:
        told = _processor(folder)._get_num_multimodal_tokens(
            image_sizes=[list(s) for s in sizes], **options
        )
        return [int(n) for n in told["num_image_tokens"]]
    except Exception as error:  # processors raise whatever their authors chose
        logger.info("%s: image tokens cannot be counted: %s", folder, error)
        return None


@lru_cache(maxsize=8)
def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)
