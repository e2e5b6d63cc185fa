"""A matrix of shares as static SVG: the darker a cell, the larger its number."""

from collections.abc import Mapping, Sequence
from html import escape

# With more columns the numbers do not fit into the cells; they are in the hover texts then.
MAX_COLUMNS_WITH_NUMBERS = 12
LABEL_WIDTH = 84
LETTER_WIDTH = 7
MAX_LABEL_LENGTH = 40


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[str, Mapping[str, float]], *, label: str
) -> str:
    """The matrix as an SVG element, or an empty string when it has no cells.

    Args:
        rows, columns: names in order.
        values: row to column to a share between 0 and 1; one that is missing is an empty cell.
        label: what it shows, for screen readers.
    """
    if not rows or not columns:
        return ""
    has_numbers = len(columns) <= MAX_COLUMNS_WITH_NUMBERS
    width, height = (52, 30) if has_numbers else (16, 16)
    left = max(LABEL_WIDTH, 12 + LETTER_WIDTH * min(MAX_LABEL_LENGTH, max(map(len, rows))))
    top = 26 if has_numbers else 14 + LETTER_WIDTH * max(map(len, columns))
    total_width, total_height = left + width * len(columns) + 4, top + height * len(rows) + 4
    parts = [
        f'<svg class="heat" viewBox="0 0 {total_width} {total_height}" width="{total_width}" role="img" '
        f'aria-label="{escape(label)}">'
    ]
    for number, name in enumerate(columns):
        x, y = left + width * number + width / 2, top - (6 if has_numbers else 2)
        look = 'text-anchor="middle"'
        if not has_numbers:
            look = f'text-anchor="start" transform="rotate(-90 {x} {y - 4})"'
        parts.append(f'<text class="tick" x="{x}" y="{y}" {look}>{escape(name)}</text>')
    largest = max((value for row in rows for value in values.get(row, {}).values()), default=0.0)
    for number, row in enumerate(rows):
        y = top + height * number
        shown = row if len(row) <= MAX_LABEL_LENGTH else f"{row[: MAX_LABEL_LENGTH - 1]}…"
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + height / 2 + 4}" text-anchor="end">{escape(shown)}</text>'
        )
        for column_number, column in enumerate(columns):
            if column in values.get(row, {}):
                place = (left + width * column_number, y, width, height)
                parts += _cell(place, values[row][column], largest, f"{row} ← {column}", has_numbers)
    return "".join([*parts, "</svg>"])


def _cell(
    place: tuple[float, float, int, int], value: float, largest: float, name: str, has_number: bool
) -> list[str]:
    x, y, width, height = place
    strength = min(1.0, max(0.0, value / largest)) if largest > 0 else 0.0
    area = f'x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="3"'
    title = f"<title>{escape(name)}: {value:.4f}</title>"
    parts = [
        f'<rect class="empty" {area}>{title}</rect>',
        f'<rect class="share" {area} fill-opacity="{strength:.3f}">{title}</rect>',
    ]
    if has_number:
        tone = "on" if strength > 0.55 else "off"
        middle = f'x="{x + width / 2}" y="{y + height / 2 + 4}" text-anchor="middle"'
        parts.append(f'<text class="number {tone}" {middle}>{value:.2f}</text>')
    return parts
