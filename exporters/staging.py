"""The name of `backends.staging`, where it lives now."""

from ..backends.staging import staged

__all__ = ["staged"]
