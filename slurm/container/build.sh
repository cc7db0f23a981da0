#!/bin/bash
# An image with all that a cluster's nodes need: Debian 12, and what `make setup` installs, in /opt/gowide.
#   slurm/container/build.sh gowide.sqsh [OPTION OF MMDEBSTRAP]...
set -euo pipefail
usage="slurm/container/build.sh gowide.sqsh (for enroot, Apptainer) or gowide.tar (for docker import) [OPTION OF MMDEBSTRAP]..."
[ $# -gt 0 ] || { echo "usage: $usage" >&2 && exit 2; }
out=$1
shift
case $out in
  *.sqsh) pack=(tar2sqfs --quiet --compressor zstd --comp-extra level=3 "$out.part") ;;
  *.tar) pack=(dd status=none of="$out.part") ;;
  *) echo "$out: neither .sqsh nor .tar: $usage" >&2 && exit 2 ;;
esac
for command in mmdebstrap git "${pack[0]}"; do
  command -v "$command" >/dev/null || { echo "$command is missing: apt install mmdebstrap squashfs-tools-ng git" >&2 && exit 2; }
done

source=$(mktemp -d)
trap 'rm -rf "$source" "$out.part"' EXIT
chmod 755 "$source"
# What is committed; with its history, from which the version is made.
git clone --quiet "file://$(git -C "$(dirname "$0")" rev-parse --show-toplevel)" "$source/gowide"

export PIP_NO_CACHE_DIR=1
# A container's own /etc/hosts is a place for the node's to be mounted on.
mmdebstrap --variant=minbase --include=ca-certificates,git,make,python3 --format=tar "$@" \
  --customize-hook="sync-in $source /opt" \
  --customize-hook='chroot "$1" make --directory /opt/gowide setup' \
  --customize-hook='touch "$1/etc/hosts"' \
  bookworm - | "${pack[@]}"
mv "$out.part" "$out"
echo "$out: Python is /opt/gowide/.venv/bin/python"
