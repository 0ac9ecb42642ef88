#!/bin/sh
# mypy --strict over the rooms under their package names: `model/` is `tpserve.model` only once it is installed. And over
# the tests of GPUs, which nothing else looks at where there is none.
set -eu
MYPY=${1:-mypy}
mkdir -p build/typing/tpserve
for room in model convert engine handler cli configs bench; do
    ln -sfn "../../../$room" "build/typing/tpserve/$room"
done
exec "$MYPY" -p tpserve.model -p tpserve.convert -p tpserve.engine -p tpserve.handler -p tpserve.cli -p tpserve.bench \
    -p tests.gpu
