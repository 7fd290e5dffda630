"""What is installed, what importing it does, and which way imports run."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "nsa_port": ROOT / "nsa_port",
    "backends": ROOT / "backends",
    "kernels": ROOT / "kernels",
}


def tracked(*folders: str) -> list[str]:
    """Files git knows or would add, as paths from the root; links are not followed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in found.splitlines() if (ROOT / path).is_file()]


def installed_as(path: str) -> str:
    """Where a source file lies in the wheel."""
    return path if path.startswith("nsa_port/") else f"nsa_port/{path}"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of this tree, built without the network."""
    out = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("tree")
    for path in [*tracked("."), "nsa_port/backends", "nsa_port/kernels"]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    build = "from setuptools import build_meta as b; b.build_sdist(o); b.build_wheel(o)"
    code = f"o = {str(out)!r}; {build}"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_holds_every_file_of_the_package(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {installed_as(path) for path in tracked("nsa_port", "backends", "kernels")}
    assert found == expected


def test_sdist_holds_everything_needed_to_build_and_test(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("nsa_port", "backends", "kernels", "tests", "ci", "*.md", "LICENSE", "*.toml")
    assert set(tracked(*folders)) - found == set()
    assert not [
        name for name in found if name.startswith(("nsa_port/backends", "nsa_port/kernels"))
    ]


def test_wheel_works_where_there_is_no_checkout(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import nsa_port, sys, json, os;"
        "print(json.dumps([os.path.dirname(nsa_port.__file__),"
        " [s.name for s in nsa_port.backends()]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    folder, names = json.loads(run.stdout)
    assert Path(folder) == tmp_path / "nsa_port"
    assert names == ["cuda", "rocm", "torch"]


def test_import_loads_no_kernel_compiler_and_touches_no_device() -> None:
    code = (
        "import sys, torch\n"
        "def touched(*a, **k): raise SystemExit('touched a device')\n"
        "torch._C._cuda_init = touched\n"
        "torch.cuda._lazy_init = touched\n"
        "import nsa_port\n"
        "loaded = {'triton', 'onnx', 'matplotlib', 'pytest', 'numpy.testing'} & set(sys.modules)\n"
        "loaded |= {m for m in sys.modules if m.startswith('nsa_port.kernels.')}\n"
        "print(sorted(loaded))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "['nsa_port.kernels.geometry', 'nsa_port.kernels.results']"


@pytest.mark.parametrize("name", ["backends", "kernels"])
def test_folders_cannot_be_imported_as_packages_of_their_own(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"import nsa_port.{name}" in run.stderr


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("nsa_port")}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels", ("nsa_port.kernels.",)),
        ("backends", ("nsa_port.kernels.", "nsa_port.backends.")),
    ],
)
def test_imports_run_one_way(folder: str, allowed: tuple[str, ...]) -> None:
    for path in sorted(PACKAGES[folder].rglob("*.py")):
        for name in imports(path):
            assert name.startswith(allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_triton_is_imported_by_kernels_alone() -> None:
    for folder in ("nsa_port", "backends"):
        for path in sorted(PACKAGES[folder].glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.split(".")[0] == "triton"], path


def test_links_let_an_uninstalled_checkout_work() -> None:
    for name in ("backends", "kernels"):
        link = ROOT / "nsa_port" / name
        if not (ROOT / ".git").exists():
            pytest.skip("not a git checkout")
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_nsa_port_backends_is_both_the_package_and_the_list() -> None:
    import nsa_port
    import nsa_port.backends.torch as module

    assert module.BACKEND.name == "torch"
    assert [status.name for status in nsa_port.backends()] == ["cuda", "rocm", "torch"]


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--version"]])
def test_command_line(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "nsa_port", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    if arguments[-1] == "--json":
        facts = json.loads(run.stdout)
        assert {backend["name"] for backend in facts["backends"]} >= {"cuda", "rocm", "torch"}
    assert run.stdout
