"""Images in conversations: fields of rows that name them, and their files for engines."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.images import file_of, url_of
from samullm_plugin.errors import InputError

FIELD_TURNS = frozenset({"history", "image"})
"""Roles of turns that name a field of the row instead of holding a template."""


def image_parts(
    fields: Mapping[str, Any], name: str, folder: Path, where: str
) -> list[dict[str, object]]:
    """Return the images that a field of a row holds, as parts of a message.

    Args:
        fields: of the row.
        name: of the field: a file, a data URL, or a list of these; empty or null: no image.
        folder: what files are relative to.
        where: node and request, for messages.

    Raises:
        InputError: if it holds something else, or a file that is not there.
    """
    value = fields.get(name)
    given = value if isinstance(value, list) else [value] if value else []
    return [
        {"type": "image_url", "image_url": {"url": _url(one, folder, f"{where}: image {name}")}}
        for one in given
    ]


def _url(value: object, folder: Path, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: it is a {type(value).__name__}; give a file or a data URL")
    if value.startswith("data:image/"):
        return value
    if "://" in value[:10]:
        raise InputError(
            f"{where}: nothing is downloaded during a run; download {value[:60]} and give the file"
        )
    path = (folder / value).resolve()
    if not path.is_file():
        raise InputError(f"{where}: there is no file {path}")
    return path.as_uri()


def with_files(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with the contents of the image files that its URLs name.

    Raises:
        OSError: if one cannot be read.
    """
    return [
        {**message, "content": [_with_file(part) for part in content]}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _with_file(part: Any) -> Any:
    image = part.get("image_url") if isinstance(part, Mapping) else None
    if not isinstance(image, Mapping) or (path := file_of(url_of(part) or "")) is None:
        return part
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {**image, "url": f"data:{kind};base64,{data}"}}
