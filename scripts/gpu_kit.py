#!/usr/bin/env python3
"""Gathers what a machine with a GPU and without a network needs, beside the source tree, in build/gpu-kit.

    scripts/gpu_kit.py [--arch 90a-real] [--release-dir FOLDER] [--wheel NAME==VERSION ...] [--python 3.12]
                       [--variant twice=-DFWPKM_FILTER_THREADS=512 ...]

The library for that GPU (it serves every Python, and every PyTorch from 2.11 on), the commit, and, where asked for,
variants of the library with other definitions (kernels/tuning.cuh), the released code and wheels of the benchmark's
peers. scripts/gpu_check.py finds all of it there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check import KIT, LIBRARY, ROOT, answer

MOST_BYTES = 64 << 20  # with the tree: what is easily sent along
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def build_library(arch, name=LIBRARY, flags=""):
    folder = ROOT / "build" / f"gpu-{arch}{flags}"
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DFWPKM_WITH_CUDA=ON", f"-DFWPKM_CUDA_ARCHS={arch}"]
    settings += ["-DFWPKM_WITH_PYBIND=OFF", f"-DCMAKE_CUDA_FLAGS={flags}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-GNinja", *settings], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)], check=True)
    subprocess.run(["strip", "-o", KIT / name, folder / LIBRARY], check=True)


def download(wheels, python):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", KIT / "wheels"]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [x for platform in PLATFORMS for x in ("--platform", platform)]
    subprocess.run([*command, *wheels], check=True)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a-real", help="as FWPKM_CUDA_ARCHS")
    parser.add_argument("--release-dir", type=Path, help="folder of the released FwPKM repository")
    parser.add_argument("--wheel", action="append", default=[], help="NAME==VERSION of a peer, without what it needs")
    parser.add_argument("--variant", action="append", default=[], help="NAME=-DNAME=VALUE: one more library")
    parser.add_argument("--python", default="3.12", help="of the other machine, for wheels")
    options = parser.parse_args()
    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir(parents=True)
    build_library(options.arch)
    for variant in options.variant:
        name, _, flags = variant.partition("=")
        build_library(options.arch, f"variant-{name}.so", flags)
    (KIT / "commit").write_text(answer(["git", "describe", "--always", "--dirty"]) + "\n")
    if options.release_dir:
        only_python = lambda folder, names: [x for x in names if not (Path(folder, x).is_dir() or x.endswith(".py"))]
        shutil.copytree(options.release_dir, KIT / "release", ignore=only_python)
    if options.wheel:
        download(options.wheel, options.python)
    tracked = sum((ROOT / x).stat().st_size for x in answer(["git", "ls-files"]).splitlines() if (ROOT / x).is_file())
    print(f"{KIT.relative_to(ROOT)}: {size(KIT) / 1e6:.1f} MB, and {tracked / 1e6:.1f} MB of the tree")
    if size(KIT) + tracked > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES >> 20} MiB in all: leave wheels out")


if __name__ == "__main__":
    main()
