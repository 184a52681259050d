"""A fresh clone and an environment of its own: README and quickstart as typed, from the install on."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.docs.as_typed import QUICKSTART, check_quickstart, run_python, run_raywgen, share_packages, typed
from tests.docs.pages import ROOT, Line, blocks_of, lines_of

# What raywgen needs is there already, and pip is not to look for newer; a new environment's own setuptools is too old.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
OFFLINE |= {"PYTHONPATH": sysconfig.get_path("purelib")}
# In place of all tests, of which this is one.
SOME_TESTS = ("tests/test_config.py", "-p", "no:cacheprovider")
WHERE = "import raywgen; print(raywgen.__file__)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from") / "raywgen"
    done = subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the project lies in no repository that can be cloned: {done.stderr.strip()}")
    return folder


def run_line(clone: Path, line: Line) -> None:
    programs = clone / ".venv/bin"
    match line.words[0]:
        case "python3":
            subprocess.run([sys.executable, *line.words[1:]], cwd=clone, check=True)
            share_packages(clone / ".venv")
        case "pip":
            typed(programs, clone, *line.words, **OFFLINE)
        case "pytest":  # Its package is shared with this environment, its program is not.
            assert " passed in " in typed(programs, clone, "python", "-m", *line.words, *SOME_TESTS).stdout
        case _:
            run_raywgen(programs, clone, line)


@pytest.mark.slow
def test_readme_and_quickstart_run_as_typed(clone: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ran: set[str] = set()
    for block in [*blocks_of("README.md"), *blocks_of(QUICKSTART)]:
        if block.text in ran:
            continue
        ran.add(block.text)
        if block.language == "python":
            said.append(run_python(clone / ".venv/bin", clone, block))
            continue
        for line in lines_of(block):
            run_line(clone, line)
    check_quickstart(clone, said)
    where = typed(clone / ".venv/bin", tmp_path, "python", "-c", WHERE).stdout.strip()
    assert Path(where).is_relative_to(clone)
