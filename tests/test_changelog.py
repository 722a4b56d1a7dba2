"""One version everywhere: the package, pyproject.toml and the top of the changelog."""

import re
from pathlib import Path

import lmcompress

ROOT = Path(lmcompress.__file__).parent.parent


def test_the_top_of_the_changelog_is_the_version():
    headings = re.findall(r"^## \[([^\]]+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version, date = headings[0]
    assert version == lmcompress.__version__
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    assert [version for version, date in headings[1:] if date == "unreleased"] == []


def test_pyproject_has_the_version_too():
    (version,) = re.findall(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version == lmcompress.__version__
