"""What an archive may look like: nothing in it but its members, stored as they are, at places inside the archive.

torch unpacks a package's members to files before it loads them, at the path a member's name says. A hash that covers
names and bytes of members says nothing about a name like `../../x` whose hash was computed anew, about bytes that are
no member's, or about members that grow when they are unpacked.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from ...rewriter.errors import PackageError

_LOCAL, _END = 30, 22  # bytes of a member's header and of the archive's last record, both without what is of any length
_DESCRIPTORS = (0, 12, 16, 20, 24)  # bytes that may stand behind a member that was written as a stream


def check_layout(archive: zipfile.ZipFile, file: Path) -> None:
    """Raise `PackageError` unless every byte of the archive is accounted for and every name stays inside."""
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if problem := _names_problem([m.filename for m in members]) or _bytes_problem(archive, members):
        raise PackageError(f"{str(file)!r} is damaged or was changed: {problem}")


def _names_problem(names: list[str]) -> str | None:
    if len(set(names)) != len(names):
        return "two of its members have one name"
    roots = {name.split("/")[0] for name in names}
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 or any(part in ("", ".", "..") for part in parts) or set(name) & set("\\:\0"):
            return f"the name of its member {name!r} leads outside of the archive"
    return f"its members are in {len(roots)} folders" if len(roots) != 1 else None


def _bytes_problem(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> str | None:
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        if not stored or member.flag_bits & 1:
            return f"its member {member.filename!r} is compressed or encrypted, and torch stores them as they are"
    stream = archive.fp
    assert stream is not None
    places = [member.header_offset for member in members] + [archive.start_dir]
    end = 0
    for member, start, following in zip(members, places, places[1:], strict=False):
        stream.seek(start)
        header = stream.read(_LOCAL)
        if start != end or len(header) < _LOCAL or header[:4] != b"PK\x03\x04":
            return f"there are bytes before its member {member.filename!r} that belong to none"
        name, extra = struct.unpack("<HH", header[26:30])
        length = _LOCAL + name + extra + member.file_size
        allowed = _DESCRIPTORS if member.flag_bits & 8 else (0,)
        if following - start - length not in allowed:
            return f"there are bytes behind its member {member.filename!r} that belong to none"
        end = following
    stream.seek(0, 2)
    size = stream.tell()
    stream.seek(max(size - _END, 0))
    last = stream.read()
    if last[:4] != b"PK\x05\x06" or last[-2:] != b"\0\0" or archive.comment:
        return "there are bytes behind its end"
    return None
