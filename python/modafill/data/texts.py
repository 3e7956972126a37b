"""Bounds of ids, labels and groups: a text that a file has once may be named for each of its samples."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_TEXT = 1 << 12
# Numpy keeps each text of a column as long as the longest, in four bytes a character.
MAX_CHARACTERS = 1 << 27
# What is stored once may be named often; the copies may take this many times the bytes of the file.
MAX_COPIES = 4


def check_texts(count: int, longest: int) -> None:
    """Raise ValueError where ``count`` texts, the ``longest`` of so many characters, are too much for a column."""
    if longest > LONGEST_TEXT:
        raise ValueError(f"expected a text of up to {LONGEST_TEXT} characters, got one of {longest}")
    if count * longest > MAX_CHARACTERS:
        raise ValueError(
            f"expected a column of up to {MAX_CHARACTERS} characters, got {count} texts of up to {longest} each"
        )


def text_column(texts: Iterable[str]) -> list[str]:
    """The texts, if a column can hold them; none beyond its bounds is asked for."""
    column: list[str] = []
    longest = 0
    for text in texts:
        column.append(text)
        longest = max(longest, len(text))
        check_texts(len(column), longest)
    return column
