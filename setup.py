"""The one part of the build that pyproject.toml can't say: AdEMAMix's kernel in C, where there is a compiler.

Without one the package installs all the same, with a warning, and the optimizer takes another implementation. The
kernel needs no header, not Python's and not torch's.
"""

from __future__ import annotations

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No contraction: the code says itself where a multiplication and an addition round once.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class BuildKernel(build_ext):
    """Build with OpenMP, else without (one thread); a failure of both is a warning, for the extension is optional."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        ext.extra_compile_args, ext.extra_link_args = [*FLAGS, "-fopenmp"], ["-fopenmp"]
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = FLAGS, []
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return the functions that ctypes looks up, not the PyInit of a module that this is not."""
        return ["ademamix_squares", "ademamix_step", "ademamix_version"]


# ``launch``, ``configs`` and ``slurm`` are installed below the package (``package-dir`` in pyproject.toml).
MAPPED = find_packages(include=["launch*", "configs*", "slurm*"])

setup(
    packages=[*find_packages(include=["anemoi_dist*"]), *(f"anemoi_dist.{name}" for name in MAPPED)],
    cmdclass={"build_ext": BuildKernel},
    ext_modules=[
        Extension("anemoi_dist.optimizers._ademamix", sources=["anemoi_dist/optimizers/_ademamix.c"], optional=True)
    ],
)
