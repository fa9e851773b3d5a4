"""What is installed is what is tracked: the wheel, also one built from the sdist, holds every file of the folders."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "engine", "kernels", "tools", "clients", "demo")


def tracked_files() -> set[str]:
    listing = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {f"lmdserve/{name}" for name in listing.splitlines() if (ROOT / name).exists()}


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_tracked_file(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout to know which files are tracked")
    wheel = build("wheel", ROOT, tmp_path / "wheel")
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    second_wheel = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path / "second")
    for path in (wheel, second_wheel):
        names = set(zipfile.ZipFile(path).namelist())
        assert tracked_files() - names == set()
        top_level = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
        assert top_level == {"lmdserve"}
