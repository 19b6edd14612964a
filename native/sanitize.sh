#!/bin/sh
# The native tests: plain, under ASan + UBSan, and under TSan.  native/sanitize.sh [plain|address|thread ...]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
for kind in ${*:-plain address thread}; do
    case $kind in
        plain) flags= ;;
        address) flags=address,undefined ;;
        thread) flags=thread ;;
        *) echo "unknown build: $kind" >&2; exit 2 ;;
    esac
    build="$here/build/sanitize-$kind"
    cmake -S "$here" -B "$build" -DCKPTENGINE_PYTHON=OFF -DCKPTENGINE_TESTS=ON -DCKPTENGINE_STRICT=ON \
        -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCKPTENGINE_SANITIZE="$flags" >/dev/null
    cmake --build "$build" --parallel 2 >/dev/null
    echo "== $kind"
    (cd "$build/native/tests" &&
        ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        TSAN_OPTIONS=halt_on_error=1 ./ckpt_tests)
done
