#!/usr/bin/env bash
# Build wheel and sdist into dist/, and see that the wheel passes the demo, installed alone.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf dist
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/build"
"$folder/build/bin/pip" install -q build twine
"$folder/build/bin/python" -m build --outdir dist
"$folder/build/bin/twine" check --strict dist/*
python3 -m venv "$folder/empty"
"$folder/empty/bin/pip" install -q dist/*.whl
cd "$folder"
empty/bin/megatron-sp-fix demo
# The sdist has what it takes to build the same wheel, and the tests.
tar -xzf "$OLDPWD"/dist/*.tar.gz
test -f megatron_sp_fix-*/tests/distributed/test_contract.py
empty/bin/pip install -q --force-reinstall --no-deps "$OLDPWD"/dist/*.tar.gz
empty/bin/megatron-sp-fix status
