"""What a CSV file may be, checked before it is read into memory."""

from __future__ import annotations

from pathlib import Path

from rayx.errors import RayxError

MOST_BYTES = 1_000_000_000
MOST_HEADER_BYTES = 10_000_000
MOST_COLUMNS = 100_000


def check_csv(path: str | Path, error: type[RayxError]) -> None:
    """Refuse what is no local file, is too large, holds zero bytes, or has too many columns.

    Raises:
        error: The file is one of these, or cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():  # a URL neither: nothing is fetched
        raise error(f"Cannot read {path}: there is no such file on this machine.")
    try:
        size = place.stat().st_size
        with open(place, "rb") as file:
            header = file.readline(MOST_HEADER_BYTES + 1)
    except OSError as reason:
        raise error(f"Cannot read {path}: {reason.strerror}.") from reason
    if size > MOST_BYTES:
        raise error(
            f"{path} has {size:,} bytes; expected at most {MOST_BYTES:,}. Leave out columns "
            "and rows that are not needed."
        )
    if header.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        raise error(f"{path} is not UTF-8 text. Save it as UTF-8 CSV.")
    if b"\0" in header:
        raise error(f"{path} holds zero bytes, so it is not CSV text.")
    columns = header.count(b",") + 1
    if len(header) > MOST_HEADER_BYTES or columns > MOST_COLUMNS:
        raise error(
            f"{path} has {columns:,} columns or more in its first line; expected at most "
            f"{MOST_COLUMNS:,}."
        )
