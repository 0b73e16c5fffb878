"""JSON merge patch, written here once more: a mistake of the client must not pass as right."""

from typing import Any


def merged(document: Any, patch: Any) -> Any:
    """RFC 7396: the document after the patch; neither is changed."""
    if not isinstance(patch, dict):
        return patch
    found = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found
