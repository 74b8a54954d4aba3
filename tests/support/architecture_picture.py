"""Draws docs/architecture.svg from the imports: a box a room, an arrow to each room it imports.

    PYTHONPATH=tests python -m support.architecture_picture      # `make picture`

Owns the picture's layout. A room stands above all that it imports on its floor. An arrow is left
out where a longer way leads there as well. A dot tells which lower floors a room imports. The same
source gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from support.import_graph import FLOORS, ROOT, arrows

PAGE = ROOT / "docs" / "architecture.svg"
TITLES = {
    "server": "server/ : what a client sees",
    "router": "router/ : which tokens run next",
    "models": "models/ : how tokens are computed",
}
COLOURS = {"server": "#e8f1fb", "router": "#eef7e8", "models": "#fdf0e3"}
DOTS = {"router": "#4a9a2a", "models": "#d9822b"}
WIDTH, MARGIN, TITLE = 1180, 14, 30
BOX_HEIGHT, ROW_HEIGHT, CHAR = 26, 50, 7.1
MOST_IN_A_ROW = 8
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
font-family="system-ui, sans-serif" font-size="13">
<style>.box {{ fill: #fff; stroke: #445; }} .t {{ font-weight: 600; }} .s {{ fill: #445; }}
.a {{ stroke: #889; fill: none; marker-end: url(#m); }}</style>
<defs><marker id="m" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">\
<path d="M0,0 L6,3 L0,6 z" fill="#667"/></marker></defs>
<rect width="{width}" height="{height}" fill="#fafafa"/>
"""

Graph = dict[str, set[str]]
Box = tuple[float, float, float]  # left, top, width


def draw() -> str:
    """The picture as SVG."""
    top = float(MARGIN)
    parts: list[str] = []
    for floor in sorted(FLOORS, key=lambda name: -FLOORS[name]):
        imported = arrows(floor)
        graph = {
            room: {below for below in reached if below.startswith(f"{floor}/")}
            for room, reached in imported.items()
        }
        rows = ordered(rows_of(graph), graph)
        height = TITLE + len(rows) * ROW_HEIGHT
        parts.append(
            f'<rect x="{MARGIN}" y="{top:g}" width="{WIDTH - 2 * MARGIN}" height="{height}" '
            f'rx="8" fill="{COLOURS[floor]}"/>\n'
            f'<text x="{MARGIN + 12}" y="{top + 20:g}" class="t">{TITLES[floor]}</text>\n'
        )
        boxes = placed(rows, top + TITLE + 12)
        parts += lines(boxes, reduced(graph))
        parts += [
            box_of(room, boxes[room], floors_below(imported[room], floor))
            for row in rows
            for room in row
        ]
        top += height + MARGIN
    return (
        HEAD.format(width=WIDTH, height=round(top + 24)) + "".join(parts) + legend(top) + "</svg>\n"
    )


def rows_of(graph: Graph) -> list[list[str]]:
    """Rooms by the longest way down from them, the longest first; at most eight a row."""
    depths: dict[str, int] = {}

    def depth(room: str) -> int:
        if room not in depths:
            depths[room] = 1 + max((depth(below) for below in graph[room]), default=-1)
        return depths[room]

    rows: list[list[str]] = []
    for level in sorted({depth(room) for room in graph}, reverse=True):
        rooms = sorted(room for room in graph if depths[room] == level)
        count = -(-len(rooms) // MOST_IN_A_ROW)
        rows += [rooms[at::count] for at in range(count)]
    return rows


def ordered(rows: list[list[str]], graph: Graph) -> list[list[str]]:
    """The rows with each room near those above that import it, so that fewer arrows cross."""
    places: dict[str, float] = {}
    for _ in range(8):
        for row in rows:
            for at, room in enumerate(row):
                places[room] = (at + 0.5) / len(row)
        for row in rows[1:]:
            wish = {room: _mean_place(room, graph, places) for room in row}
            row.sort(key=lambda room: (wish[room], room))
    return rows


def _mean_place(room: str, graph: Graph, places: dict[str, float]) -> float:
    above = [places[other] for other, below in sorted(graph.items()) if room in below]
    return round(sum(above) / len(above), 6) if above else places[room]


def reduced(graph: Graph) -> Graph:
    """The arrows without those for which a longer way stands."""
    reached: Graph = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            reached[room] = {room}.union(*(reach(below) for below in graph[room]))
        return reached[room]

    return {
        room: {one for one in below if not any(one in reach(other) for other in below - {one})}
        for room, below in graph.items()
    }


def placed(rows: list[list[str]], top: float) -> dict[str, Box]:
    """Left, top and width of each room's box; a row fills the width evenly."""
    boxes: dict[str, Box] = {}
    for number, row in enumerate(rows):
        widths = [22 + CHAR * len(label(room)) for room in row]
        space = (WIDTH - 4 * MARGIN - sum(widths)) / (len(row) + 1)
        left = 2 * MARGIN + space
        for room, width in zip(row, widths, strict=True):
            boxes[room] = (left, top + number * ROW_HEIGHT, width)
            left += width + space
    return boxes


def label(room: str) -> str:
    """A room without its floor: `blocks/` is a folder, `config` a module."""
    name = room.split("/", 1)[1]
    return f"{name}/" if (ROOT / room).is_dir() else name


def lines(boxes: dict[str, Box], graph: Graph) -> list[str]:
    found = []
    for room in sorted(graph):
        left, top, width = boxes[room]
        for below in sorted(graph[room]):
            to_left, to_top, to_width = boxes[below]
            x, y, to_x = left + width / 2, top + BOX_HEIGHT, to_left + to_width / 2
            bend = (to_top - y) / 2
            found.append(
                f'<path class="a" d="M{x:.0f},{y:.0f} C{x:.0f},{y + bend:.0f} '
                f'{to_x:.0f},{to_top - bend:.0f} {to_x:.0f},{to_top - 1:.0f}"/>\n'
            )
    return found


def floors_below(imported: Iterable[str], floor: str) -> list[str]:
    return sorted({room.split("/")[0] for room in imported} - {floor})


def box_of(room: str, box: Box, floors: list[str]) -> str:
    left, top, width = box
    dots = "".join(
        f'<circle cx="{left + width - 8 - 11 * at:.0f}" cy="{top + BOX_HEIGHT:.0f}" r="4" '
        f'fill="{DOTS[name]}"/>'
        for at, name in enumerate(floors)
    )
    return (
        f'<rect class="box" x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" '
        f'height="{BOX_HEIGHT}" rx="5"/><text x="{left + width / 2:.0f}" y="{top + 18:.0f}" '
        f'text-anchor="middle">{escape(label(room))}</text>{dots}\n'
    )


def legend(top: float) -> str:
    return (
        f'<text x="{MARGIN + 12}" y="{top + 10:g}" class="s">arrow: imports on its floor</text>'
        f'<circle cx="300" cy="{top + 6:g}" r="4" fill="{DOTS["router"]}"/>'
        f'<text x="310" y="{top + 10:g}" class="s">imports router/</text>'
        f'<circle cx="430" cy="{top + 6:g}" r="4" fill="{DOTS["models"]}"/>'
        f'<text x="440" y="{top + 10:g}" class="s">imports models/</text>\n'
    )


if __name__ == "__main__":
    PAGE.write_text(draw(), "utf-8")
