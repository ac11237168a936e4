#!/bin/bash
# Makes five successive states of one machine, as ./machine-N-memory.raw and
# ./machine-N-disk.raw in the current, empty folder:
#
#   machine.sh COPPICE KERNEL DISK MEMORY_MIB
#
# Each is a capture of the running machine after one more piece of work in it,
# exported from the store. Needs /dev/kvm.
set -euo pipefail
coppice=$1 kernel=$2 disk=$3 memory=$4
export COPPICE_HOME=$PWD/store
trap '"$coppice" serve --stop > /dev/null 2>&1 || true' EXIT

"$coppice" import "$disk" --name base
"$coppice" run --name m --kernel "$kernel" --disk base --memory "$memory"
work=(
    'true'
    'cat /usr/lib/python3.11/*.py > /var/lib/all.py; sync'
    'python3 -c "import json, http.client, sqlite3; open(\"/var/lib/a.json\", \"w\").write(json.dumps(list(range(300000))))"; sync'
    'rm /var/lib/all.py; tar -c /usr/lib/python3.11/json /usr/bin | gzip -1 > /var/lib/bin.tar.gz; sync'
    'sha256sum /usr/lib/x86_64-linux-gnu/*.so.* > /var/lib/sums; rm /var/lib/a.json; sync'
)
for n in "${!work[@]}"; do
    echo "state $((n + 1)): ${work[n]}"
    "$coppice" exec m -- sh -ec "${work[n]}"
    "$coppice" snapshot m --name "s$((n + 1))"
done
"$coppice" rm --force m
for n in "${!work[@]}"; do
    "$coppice" export "s$((n + 1))" "machine-$((n + 1))-memory.raw" --memory
    "$coppice" export "s$((n + 1))" "machine-$((n + 1))-disk.raw" --disk 0
done
"$coppice" serve --stop
rm -rf store
