#!/bin/bash
# Makes the root disk ./disk.raw in the current, empty folder: a raw ext4 file
# system without a partition table, sparse:
#
#   image.sh ROOTFS.tar AGENT
#
# Needs root. The same archive and the same agent give the same bytes: the
# names of the file system are fixed, and so is every time in it.
set -euo pipefail
rootfs=$1 agent=$2
size=1G
epoch=1640995200

export LC_ALL=C TZ=UTC E2FSPROGS_FAKE_TIME=$epoch
# The machine's own defaults for file systems must not show in the result.
export MKE2FS_CONFIG=$PWD/mke2fs.conf
printf '[defaults]\n[fs_types]\n\text4 = {\n\t}\n' > mke2fs.conf
mkdir root
tar -x -p -C root --numeric-owner --xattrs --xattrs-include='*' -f "$rootfs"
install -D -m 0755 -o 0 -g 0 "$agent" root/usr/sbin/coppice-agent
find root -newermt "@$epoch" -exec touch -h -d "@$epoch" {} +

truncate -s "$size" disk.part
mke2fs -q -F -t ext4 -b 4096 -I 256 -i 16384 -m 0 -L coppice-root \
    -O none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,64bit,metadata_csum \
    -J size=16 -U 6b1d1f7e-b6f1-4d0c-9a54-2f7e4c1d0a01 \
    -E hash_seed=6b1d1f7e-b6f1-4d0c-9a54-2f7e4c1d0a02,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard \
    -d root disk.part

# mke2fs copies each file's change and access time, which nobody can set.
last=$(dumpe2fs -h disk.part 2> /dev/null | awk '
    /^Inode count:/ { count = $3 } /^Free inodes:/ { free = $3 } END { print count - free }')
{
    for inode in 2 $(seq 11 "$last"); do
        echo "set_inode_field <$inode> ctime @$epoch"
        echo "set_inode_field <$inode> atime @$epoch"
    done
} > times
debugfs -w -f times disk.part > times.log 2>&1
if grep -vE '^debugfs( 1\.|:)' times.log; then
    echo "debugfs could not set the times" >&2
    exit 1
fi
e2fsck -f -n disk.part
mv disk.part disk.raw
rm -rf root times times.log mke2fs.conf
