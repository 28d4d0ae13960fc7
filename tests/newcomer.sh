#!/usr/bin/env bash
# What a newcomer does, in empty folders: clones, resolves the pins with the package index, builds the
# source distribution and the wheel, installs it into a fresh environment and runs README's snippets.
# It takes the last commit, not the working tree, and needs `make dev`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tools=$root/.venv/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "clone"
clone="$work/a clone" # a folder with a space in its name
git clone --quiet "$root" "$clone"
cd "$clone"

step "resolve constraints.txt with the package index"
"$tools/python" -m pytest -m index tests/test_constraints.py

step "build the source distribution, and from it the wheel, as pip install of it does"
"$tools/python" -m build --sdist
# `make dev` compiles the CUDA module, which takes minutes more.
if ! CLP_KERNELS_SKIP_CUDA=1 "$tools/python" -m pip wheel --verbose --no-deps -w dist \
    dist/*.tar.gz >"$work/build.log" 2>&1 || grep -E '[0-9]: warning:' "$work/build.log"; then
    cat "$work/build.log"
    exit 1
fi
grep 'CLP_KERNELS_SKIP_CUDA=1. Skipping clp_kernels._cuda' "$work/build.log"
built=$("$tools/python" -m zipfile -l dist/*.whl | grep -o 'clp_kernels/_[a-z]*\.[^ ]*\.so')
[[ $built == clp_kernels/_cpu.*.so ]] || { echo "the wheel holds: $built"; exit 1; }

step "install the wheel into a fresh environment"
"$tools/python" -m venv "$work/env"
fresh=$work/env/bin
"$fresh/python" -m pip install --quiet -c constraints.txt dist/*.whl
"$fresh/python" -m pip check
"$fresh/clp" --version
"$fresh/clp" info | grep -E '_cpu +loaded'

step "run README's snippets there"
mkdir "$work/reader"
cd "$work/reader"
"$fresh/python" "$clone/tests/test_readme.py" "$fresh/clp"

step "done"
