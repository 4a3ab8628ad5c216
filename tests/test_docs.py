"""What the documentation names is there: links, files, and the choices in its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composition import conf_dir

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "runs").glob("**/README.md"))]
COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"^    velora-(?:train|memory) (.*?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:velora|conf|tests|runs|docs)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = {file.name for folder in ("velora", "tests", "docs") for file in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"(?<![\w/])\w+\.py\b", text)) <= files


@pytest.mark.parametrize("command", COMMANDS)
def test_the_choices_of_commands_are_known(command):
    for word in shlex.split(command):
        group, _, value = word.partition("=")
        folder = conf_dir() / group
        if not value or not folder.is_dir() or value == "signum":  # that is the example of docs/extending.md
            continue
        if glob := re.fullmatch(r"glob\(([^,]+).*\)", value):
            assert list(folder.glob(f"{glob[1]}.yaml")), word
        else:
            assert [choice for choice in value.split(",") if not (folder / f"{choice}.yaml").is_file()] == [], word
