"""The rooms of kaggle_utils: which may import which, how large they may grow, and a clip's way through them.
"""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

# From the ground floor up. A room may import from its own floor only where the row says so, and never from
# above.
FLOORS = [
    ["disk", "check", "metrics", "kaggle.paths", "results"],
    ["blocks", "voice.layers", "storage"],
    ["media.children", "media.files", "media.video", "media.isolation", "media.sound"],
    ["spread"],
    ["datasets.drawing", "datasets.babble", "datasets.miniature", "datasets.dfdc"],
    [
        "face.detection",
        "face.likeness",
        "face.framing",
        "face.quality",
    ],
    ["voice.speech", "voice.signal"],
    ["fusion.rules"],
    ["extraction", "extracts", "submission", "scoring"],
    ["detector"],
    ["plots", "tables", "explain", "pictures", "report", "overview"],
    ["app.session", "app.desk", "app.server", "kaggle.push"],
    ["__main__"],
]
ORDER = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
LONGEST_FILE, WHOLE_MODULE, SERVING = 450, 7500, 4000  # lines


def files() -> dict[str, Path]:
    package = ROOT / "kaggle_utils"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
    }


def imported(room: str, source: str, late: bool = True) -> set[str]:
    """The rooms that the source of ``room`` imports: at its top and, where ``late``, inside functions."""
    package = ["kaggle_utils", *room.split(".")[:-1]]
    names = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                for found in (".".join([*base, alias.name][1:]), ".".join(base[1:])):
                    if found in ORDER:
                        names.add(found)
                        break
    return names


def needed(room: str) -> set[str]:
    """The rooms that load with ``room``: all that scoring a clip needs."""
    source = files()[room].read_text(encoding="utf-8")
    return {room}.union(*(needed(other) for other in imported(room, source, late=False)))


def climbs(room: str, source: str) -> set[str]:
    """Imports that lead up: to a higher floor, or to a later room of the same floor."""
    return {other for other in imported(room, source) if ORDER[other] >= ORDER[room]}


def test_every_file_has_its_room():
    assert {room for room in files() if room.rpartition(".")[2] != "__init__"} == set(ORDER)


def test_no_room_imports_a_higher_one():
    found = {
        room: climbs(room, path.read_text(encoding="utf-8"))
        for room, path in files().items()
        if room in ORDER
    }
    assert not {room: others for room, others in found.items() if others}


@pytest.mark.parametrize(
    "planted",
    [
        "from ..detector import Detector",
        "from .. import report",
        "from .quality import quality_note",
        "def late():\n    from ..fusion import rules",
    ],
)
def test_a_planted_arrow_is_seen(planted):
    assert climbs("face.framing", planted)


def test_rooms_stay_small():
    lines = {room: len(path.read_text(encoding="utf-8").splitlines()) for room, path in files().items()}
    assert not {room: count for room, count in lines.items() if count > LONGEST_FILE}
    assert sum(lines.values()) <= WHOLE_MODULE
    assert sum(lines[room] for room in needed("detector")) <= SERVING


def test_the_module_does_not_need_the_recipes():
    """They stand above it: research code that serves no clip. The command ``train`` hands over to them."""
    naming = {room for room, path in files().items() if "recipes" in path.read_text(encoding="utf-8")}
    assert naming <= {"__main__", "kaggle.push"}
