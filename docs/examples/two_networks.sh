#!/usr/bin/env bash
# From two checkpoints to a network that onnxruntime runs, without a program: the commands of docs/cli.md.
#
#   docs/examples/two_networks.sh FOLDER
#
# FOLDER holds the checkpoints and images that two_networks.yaml names; `make_digits.py FOLDER` makes some.
set -euo pipefail

cp "$(dirname "${BASH_SOURCE[0]}")/two_networks.yaml" "$1/recipe.yaml"
cd "$1"

fxzip zip recipe.yaml --out zipped --quiet
fxzip evaluate zipped --data.low=test/low --data.high=test/high
fxzip export zipped zipped.onnx
fxzip evaluate zipped.onnx --recipe=recipe.yaml
