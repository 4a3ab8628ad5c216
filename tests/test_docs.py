"""What the documentation names is there: links, files, and the choices in its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from velora.config.overrides import checked, choices, conf_dir

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
    files = {file.name for folder in ("velora", "tests") for file in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"(?<![\w/])\w+\.py\b", text)) <= files


@pytest.mark.parametrize("command", COMMANDS)
def test_the_choices_of_commands_are_known(command):
    overrides = [word for word in shlex.split(command) if re.match(r"\w+=", word)]
    for override in checked(["-m", *overrides])[1:]:
        group, _, values = override.partition("=")
        known = choices(group, [conf_dir()])
        assert not known or set(values.split(",")) <= {*known, "signum"}, override  # signum: the page's own example
