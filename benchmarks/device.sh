#!/usr/bin/env bash
# Tests and times pcsim on a device, in at most eight minutes: bash benchmarks/device.sh --device cuda --json rows.json
# With --device cpu --quick it does all that in tiny and in seconds, which shows that it runs and measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.device "$@"
