"""What is installed: a wheel has all that the package reads, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lmcompress
from lmcompress.errors import LmcompressError
from lmcompress.recipes import builtin_recipes, loading

PACKAGE = Path(lmcompress.__file__).parent
ROOT = PACKAGE.parent
SOURCES = ("lmcompress", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
READ = {
    "lmcompress/py.typed",
    *(str(path.relative_to(ROOT)) for folder in PACKAGE.rglob("templates") for path in folder.iterdir()),
    *(str(path.relative_to(ROOT)) for path in (PACKAGE / "data" / "embedded").iterdir() if path.is_file()),
    *(f"lmcompress/recipes/library/{path.relative_to(ROOT / 'recipes')}" for path in ROOT.glob("recipes/**/*.yaml")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The sources alone: what an earlier build has left beside them must not get into a wheel."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def _call(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _wheel(source, to):
    _call(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-w", to)
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_outside_of_a_checkout(sources, tmp_path):
    wheel = _wheel(sources, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as packed:
        assert set(packed.namelist()) >= READ
        (points,) = (name for name in packed.namelist() if name.endswith("entry_points.txt"))
        assert "lmcompress = lmcompress.cli:main" in packed.read(points).decode()
    _call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    _call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    # what the package needs is read from where these tests have it: downloading it anew would take minutes
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": environment | {"OMP_NUM_THREADS": "1"}}
    where = _call(python, "-c", "import lmcompress; print(lmcompress.__file__)", **options)
    assert Path(where.strip()).is_relative_to(tmp_path)
    listed = _call(tmp_path / "venv" / "bin" / "lmcompress", "recipes", "list", **options)
    assert all(name in listed for name in builtin_recipes())
    few = ("training.max_steps=2", "training.num_train_epochs=1", "task.limit=64", "model.hidden_size=32")
    _call(tmp_path / "venv" / "bin" / "lmcompress", "quickstart", *few, "-o", tmp_path / "run", **options)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_sdist_makes_the_same_wheel(sources, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist(r'{tmp_path}')"
    _call(sys.executable, "-c", build, cwd=sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    names = [
        sorted(zipfile.ZipFile(_wheel(source, tmp_path / place)).namelist())
        for source, place in ((sources, "one"), (unpacked, "two"))
    ]
    assert names[0] == names[1]


def test_recipes_that_are_missing_are_one_message(tmp_path, monkeypatch):
    place = tmp_path / "site-packages" / "lmcompress" / "recipes"
    place.mkdir(parents=True)
    monkeypatch.setattr(loading, "__file__", str(place / "loading.py"))
    with pytest.raises(LmcompressError, match=r"built-in recipes are missing from .*library and .*: reinstall lmcompr"):
        builtin_recipes()
    (place / "library").mkdir()
    (place / "library" / "mine.yaml").write_text("name: mine\n")
    assert builtin_recipes() == {"mine": "name: mine\n"}
