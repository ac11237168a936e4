#!/bin/bash
# Builds a guest kernel in the current, empty folder:
#
#   build.sh SOURCE.tar.xz FLAVOUR JOBS
#
# FLAVOUR names FLAVOUR.config and, if there is one, FLAVOUR.patch beside this
# script. The result is ./vmlinux, an ELF file, with the configuration it was
# built from in ./config. User, host and time are fixed, so the same source,
# recipe and compiler give the same bytes.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
source=$1 flavour=$2 jobs=$3

export LC_ALL=C TZ=UTC
export KBUILD_BUILD_USER=coppice KBUILD_BUILD_HOST=coppice
export KBUILD_BUILD_TIMESTAMP='Sat Jan  1 00:00:00 UTC 2022' KBUILD_BUILD_VERSION=1

echo "unpacking $source"
mkdir tree
tar -x --xz --strip-components=1 -C tree -f "$source"
cd tree
if [ -e "$recipe/$flavour.patch" ]; then
    patch -p1 --forward --batch < "$recipe/$flavour.patch"
fi

make -s allnoconfig
scripts/kconfig/merge_config.sh -m .config "$recipe/$flavour.config"
make -s olddefconfig

# An option that the source no longer knows would silently be dropped, and
# with it a device: say so here rather than at the first boot.
missing=0
while read -r line; do
    grep -qxF "$line" .config || { echo "the kernel's configuration lacks $line"; missing=1; }
done < <(grep -E '^CONFIG_[A-Z0-9_]+=' "$recipe/$flavour.required")
[ "$missing" = 0 ] || exit 1

make -j"$jobs" vmlinux
cd ..
mv tree/vmlinux tree/.config .
mv .config config
rm -rf tree
