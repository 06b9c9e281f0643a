"""Builds the C++ extension with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension module whose sources are known to CMakeLists.txt; `depends` only puts them into the sdist."""

    def __init__(self, name: str) -> None:
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".hpp"))
        super().__init__(name, sources=[], depends=["CMakeLists.txt", *map(str, files)])


class CMakeBuild(build_ext):
    """Configures and builds in build/cmake-<python>-<platform>, which is kept so that the next build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        output = (Path.cwd() / self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        discard_foreign_cache(build)

        configure = [
            *[cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"],
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DFLEXREC_MODULE_NAME={output.name}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run(configure, "CMake could not configure the C++ extension. Is a C++17 compiler installed (g++, clang, MSVC)?")
        run([cmake, "--build", str(build), "--target", "_core"], "The C++ extension did not compile.")
        # Replaced, not overwritten: a running process may have the old file mapped.
        fresh = output.with_name(output.name + ".new")
        shutil.copy2(build / output.name, fresh)
        os.replace(fresh, output)


def find_tool(name: str, directory_attribute: str) -> str:
    """The path of `name`: from its PyPI package (which isolated builds install), else from PATH."""
    try:
        package = __import__(name)
        candidate = shutil.which(name, path=getattr(package, directory_attribute))
    except (ImportError, AttributeError):
        candidate = None
    found = candidate or shutil.which(name)
    if found is None:
        raise SystemExit(f"flexrec needs {name} to build its C++ extension: run `pip install {name}` and try again.")
    return found


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        message = "flexrec needs pybind11 to build its C++ extension: run `pip install pybind11` and try again."
        raise SystemExit(message) from None
    return pybind11.get_cmake_dir()


def discard_foreign_cache(build: Path) -> None:
    """Remove a build folder that was configured for another place: CMake refuses a cache that moved with its tree."""
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n" not in cache.read_text():
        shutil.rmtree(build)


def run(command: list[str], failure: str) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{failure} The output above says why; the command was: {' '.join(command)}") from error


setup(
    packages=[*find_packages(include=["flexrec", "flexrec.*"]), "flexrec.triton_kernels"],
    # A top-level module `triton_kernels` would collide with Triton's own package of that name, which vLLM imports.
    package_dir={"flexrec.triton_kernels": "triton_kernels"},
    package_data={
        "flexrec": ["py.typed", "*.pyi"],
        "flexrec.experiment.report": ["page.html", "page.css"],
        "flexrec.serving": ["page.html"],
    },
    ext_modules=[CMakeExtension("flexrec._core")],
    cmdclass={"build_ext": CMakeBuild},
)
