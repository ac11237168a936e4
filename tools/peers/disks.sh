#!/bin/bash
# Makes the root disks that the peers are compared on, as ./disk-N-NAME.raw in
# the current, empty folder: raw ext4 file systems of one small Debian with
# other packages, before and after its upgrade.
#
#   disks.sh ROOTFS.tar
#
# Needs root and the network. The packages are those that Debian has on the
# day: the corpus is the same for all programs of one run, not for all runs.
set -euo pipefail
rootfs=$1
export LC_ALL=C TZ=UTC DEBIAN_FRONTEND=noninteractive
export MKE2FS_CONFIG=$PWD/mke2fs.conf
printf '[defaults]\n[fs_types]\n\text4 = {\n\t}\n\tsmall = {\n\t}\n' > mke2fs.conf

inside() {
    chroot "$1" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C TZ=UTC \
        DEBIAN_FRONTEND=noninteractive http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" \
        "${@:2}"
}

get() { # ROOT ARGUMENT... of apt-get
    echo "apt-get ${*:2}"
    inside "$1" apt-get -y -q -o APT::Install-Recommends=0 -o Dpkg::Options::=--force-unsafe-io \
        -o APT::Sandbox::User=root "${@:2}"
}

image() { # ROOT NAME: without the archives and lists that a user would clean
    local root=$1 name=$2 mib
    cp -a "$root" shot
    rm -rf shot/var/cache/apt/archives/*.deb shot/var/lib/apt/lists/* shot/var/cache/apt/*.bin
    mib=$(($(du -s --apparent-size -B1M shot | cut -f1) * 5 / 4 + 128))
    echo "$name: $mib MiB"
    truncate -s "${mib}M" part
    mke2fs -q -F -t ext4 -b 4096 -I 256 -i 16384 -m 0 \
        -O none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,64bit,metadata_csum \
        -J size=16 -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard -d shot part
    mv part "disk-$name.raw"
    rm -rf shot
}

mkdir root
tar -x -p -C root --numeric-owner -f "$rootfs"
printf '#!/bin/sh\nexit 101\n' > root/usr/sbin/policy-rc.d
chmod 0755 root/usr/sbin/policy-rc.d
cat /etc/resolv.conf > root/etc/resolv.conf
image root 1-base
cp -a root web
get root update
get root upgrade
image root 2-base-upgraded
get root install git python3-requests python3-yaml
image root 3-python
get root install gcc libc6-dev make
image root 4-compiler
get web update
get web install nginx-light sqlite3 redis-server
image web 5-web
get web upgrade
image web 6-web-upgraded
rm -rf root web mke2fs.conf
