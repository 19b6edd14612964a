#!/bin/sh
# Builds the extension into the source tree, for development: native/build.sh [build directory]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-"$here/build/dev"}
python=${PYTHON:-"$here/.venv/bin/python"}
cmake -S "$here" -B "$build" -G Ninja -DPython_EXECUTABLE="$python" -DCKPTENGINE_STRICT=ON
cmake --build "$build"
cp "$build"/native/_native*.so "$here/ckptengine/"
