#!/bin/bash
# Makes the base of the guest's root disk, a small Debian with Python, as
# ./rootfs.tar in the current, empty folder, and lists its packages with their
# versions in ./manifest:
#
#   build.sh MIRROR
#
# Needs root. Nothing in the result depends on when or where it was made: the
# same package versions give the same bytes.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
mirror=$1
suite=bookworm
epoch=1640995200 # 2022-01-01, the time of all that the recipe itself writes

export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=$epoch
umask 022
packages=$(grep -v '^#' "$recipe/packages" | paste -sd, -)
debootstrap --variant=minbase --arch=amd64 --include="$packages" "$suite" root "$mirror"

echo "compiling Python's library"
find root/usr/lib/python3* root/usr/share -name __pycache__ -type d -prune -exec rm -rf {} +
# Unchecked: a changed modification time must not make the slow guest compile
# again, nor make it look at the source at all.
PYTHONHASHSEED=0 chroot root python3 -m compileall -q -f -j1 \
    --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.11

echo "cleaning"
chroot root dpkg-query -W -f '${Package} ${Version}\n' | sort > manifest
rm -rf root/var/lib/apt/lists/* root/var/cache/apt/* root/var/cache/ldconfig/* \
    root/var/cache/debconf/* root/var/log/* root/tmp/* root/run/* root/debootstrap \
    root/var/lib/dpkg/*-old root/var/lib/systemd root/var/lib/dbus \
    root/usr/share/man/* root/usr/share/info/* root/usr/share/locale/* root/usr/share/lintian
rm -f root/etc/{passwd,group,shadow,gshadow,subuid,subgid}- root/etc/.pwd.lock
find root/usr/share/doc -mindepth 1 ! -name copyright ! -type d -delete
find root/usr/share/doc -mindepth 1 -type d -empty -delete
mkdir -p root/var/cache/apt/archives/partial root/var/lib/apt/lists/partial
# The day on which each password was last changed: the day of the build.
sed -i -E 's/^([^:]*:[^:]*):[0-9]*:/\1:18993:/' root/etc/shadow

# The image names no host: the agent gives each machine its identity.
: > root/etc/machine-id
echo guest > root/etc/hostname
cat > root/etc/hosts <<'HOSTS'
127.0.0.1 localhost guest
::1 localhost ip6-localhost
HOSTS
rm -f root/etc/resolv.conf
echo 'nameserver 1.1.1.1' > root/etc/resolv.conf
cat > root/etc/fstab <<'FSTAB'
/dev/vda / ext4 rw,noatime 0 1
FSTAB
cat > root/etc/apt/sources.list <<SOURCES
deb http://deb.debian.org/debian $suite main
deb http://deb.debian.org/debian $suite-updates main
deb http://deb.debian.org/debian-security $suite-security main
SOURCES
install -d -m 0700 root/root

tar -c -C root --sort=name --numeric-owner --xattrs --format=pax \
    --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
    --mtime=@$epoch --clamp-mtime -f rootfs.tar .
rm -rf root
