"""Builds the wheel and the source distribution and tries both in empty environments: `make release-check`.

For each extra alone: it installs, `groupvit` starts, and what it is for works; without a framework, commands that need
one say which extra is missing.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

MAX_WHEEL = 12_000_000  # bytes; the bundled model takes eight million
OK, BACKEND_MISSING = 0, 3


class Check(NamedTuple):
    """A command of an environment, its exit code, and a part of what it prints (to either stream)."""

    command: Sequence[str]
    code: int = OK
    prints: str = ""
    variables: tuple[tuple[str, str], ...] = ()


_NO_BACKEND = Check(
    ("groupvit", "segment", "photo.png", "--labels", "red", "--model", "demo"), BACKEND_MISSING, "groupvit[torch]"
)
_HELP = (Check(("groupvit", "--version"), prints="groupvit "), Check(("groupvit", "--help"), prints="segment"))


def _segments(backend: str, *variables: tuple[str, str]) -> Check:
    command = ("groupvit", "segment", "photo.png", "--labels", "red, blue", "--model", "demo", "--backend", backend)
    return Check(command, prints="red", variables=variables)


def _python(code: str) -> Check:
    return Check(("python", "-W", "error", "-c", code))


CHECKS: dict[str, tuple[Check, ...]] = {
    "": (*_HELP, _NO_BACKEND, Check(("groupvit", "inspect", "demo"), prints="2 stages")),
    "torch": (*_HELP, _segments("torch"), _python("from groupvit_torch import GroupViTModel, Segmenter")),
    "tf": (*_HELP, _segments("tf"), _python("from groupvit_tf import TFGroupViTModel, Segmenter")),
    "jax": (*_HELP, _segments("tf", ("KERAS_BACKEND", "jax"))),
    "convert": (*_HELP, _NO_BACKEND, Check(("groupvit", "convert", "demo", "old", "--to", "transformers-tf"))),
    "serve": (*_HELP, _python("import groupvit_common.serving"), _NO_BACKEND),
    "evaluate": (*_HELP, _NO_BACKEND),
}  # fmt: skip


def main() -> None:
    """Runs the checks of all extras, or of those that are named; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="an extra, or none (default: all)")
    chosen = parser.parse_args().extras or list(CHECKS)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        failures = [
            failure
            for extra in chosen
            for failure in check(wheel, "" if extra == "none" else extra, Path(folder) / f"in-{extra or 'none'}")
        ]
    print("\n".join(failures) or "all of it works")
    sys.exit(bool(failures))


def build(folder: Path) -> Path:
    """Returns the wheel that is built from the source distribution, which is built from this tree."""
    _run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path
        for path in _run(["git", "ls-files", "groupvit_common", "groupvit_torch", "groupvit_tf", "conversion"]).split()
        if (ROOT / path).is_file()
    }
    assert packed == wanted, f"the wheel differs from the tree: {sorted(packed ^ wanted)[:10]}"
    size = wheel.stat().st_size
    assert size < MAX_WHEEL, f"the wheel has {size / 1e6:.1f} MB"
    with tarfile.open(source) as sources:
        names = [Path(*Path(name).parts[1:]) for name in sources.getnames()]
    assert {Path("LICENSE"), Path("README.md"), Path("pyproject.toml")} <= set(names)
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {len(packed)} files", flush=True)
    return wheel


def check(wheel: Path, extra: str, folder: Path) -> list[str]:
    """Returns what failed in a new environment with this extra alone."""
    _run([sys.executable, "-m", "venv", str(folder)])
    name = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, name, "--constraint", str(ROOT / "constraints.txt")])
    work = folder / "work"
    work.mkdir()
    _run(
        [
            str(folder / "bin" / "python"),
            "-c",
            "from PIL import Image; Image.new('RGB', (64, 64), 'red').save('photo.png')",
        ],
        work,
    )
    failures = []
    for each in CHECKS[extra]:
        variables = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **dict(each.variables),
        }
        environment = clean_environment() | variables
        done = subprocess.run(each.command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        printed = done.stdout + done.stderr
        if done.returncode != each.code or each.prints not in printed:
            failures.append(
                f"[{extra or 'none'}] {' '.join(each.command)}: exit code {done.returncode}\n{printed[-2000:]}"
            )
    print(f"{extra or 'no extra'}: {len(CHECKS[extra]) - len(failures)} of {len(CHECKS[extra])} checks", flush=True)
    return failures


def clean_environment() -> dict[str, str]:
    """That of this process without what would lead Python to this tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GROUPVIT"))}


def _run(command: Sequence[str], folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
