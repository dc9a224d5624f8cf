#!/bin/sh
# Makes one stand-in Spark and becomes its Docker Engine. This script runs in mount, process and host-name namespaces of
# its own, so its changes below /etc, /opt, /run, /dev and /proc are visible only in there.
#   boot.sh NAME STATE DATA CGROUP REPOSITORY PYTHON
set -eu
NAME=$1 STATE=$2 DATA=$3 CGROUP=$4 REPOSITORY=$5 PYTHON=$6

echo "$NAME" > /proc/sys/kernel/hostname

# After a power cut the first three of these name processes that have ended.
rm -rf "$STATE/exec" "$STATE/docker.pid" "$STATE/docker.sock" "${STATE:?}/bin"
mkdir -p "$STATE/net" "$STATE/private" "$STATE/bin"
# dockerd finds these two programs first, by its PATH. dockerd offers `--gpus` only if it finds the hook.
ln -s /bin/true "$STATE/bin/nvidia-container-runtime-hook"
printf '#!/bin/sh\nexec "%s" -IS "%s" "%s" "%s" "$@"\n' \
    "$PYTHON" "${0%/*}/runc.py" "$(command -v runc)" "$STATE/additions.json" > "$STATE/bin/runc"
chmod +x "$STATE/bin/runc"
cp /etc/resolv.conf "$STATE/"

touch "$STATE/net/own" "$STATE/net/machine"
mount --bind "/run/netns/$NAME" "$STATE/net/own"
mount --bind /proc/self/ns/net "$STATE/net/machine"
mount -t tmpfs -o mode=755 rehearsal "$STATE/private"

# Containers mount scripts of the repository. The repository may lie below a folder that the next lines cover.
mkdir "$STATE/private/repository"
mount --bind "$REPOSITORY" "$STATE/private/repository"
# An overlay covers each folder, because dockerd and containerd write keys, folders and sockets there. Otherwise dockerd
# would also find the containerd of this machine.
for folder in etc opt run; do
    mkdir -p "/$folder" "$STATE/private/$folder/upper" "$STATE/private/$folder/work"
    mount -t overlay -o \
        "lowerdir=/$folder,upperdir=$STATE/private/$folder/upper,workdir=$STATE/private/$folder/work" overlay "/$folder"
done
mkdir -p "$REPOSITORY"
mount --bind "$STATE/private/repository" "$REPOSITORY"
mkdir -p /run/containerd
mount -t tmpfs -o mode=711 rehearsal /run/containerd
rm -f /etc/hosts /etc/resolv.conf
cp "$STATE/hosts" "$STATE/resolv.conf" /etc/

mkdir "$STATE/private/dev" "$STATE/private/dev/pts" "$STATE/private/dev/shm"
for node in null zero full random urandom tty fuse; do
    [ ! -e "/dev/$node" ] || cp -a "/dev/$node" "$STATE/private/dev/"
done
ln -s /proc/self/fd /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 "$STATE/private/dev/"
mv "$STATE/private/dev/0" "$STATE/private/dev/stdin"
mv "$STATE/private/dev/1" "$STATE/private/dev/stdout"
mv "$STATE/private/dev/2" "$STATE/private/dev/stderr"
ln -s pts/ptmx "$STATE/private/dev/ptmx"
mount --bind /dev/pts "$STATE/private/dev/pts"
mount --bind /dev/shm "$STATE/private/dev/shm"
mkdir "$STATE/private/dev/infiniband"
mknod "$STATE/private/dev/infiniband/uverbs0" c 1 3
mount --rbind "$STATE/private/dev" /dev
mount -t proc proc /proc

# Without this file dockerd would read the file of this machine. The snapshotter is off, because rehearsal/image.py
# clones the layers of overlay2.
echo '{"features": {"containerd-snapshotter": false}}' > "$STATE/engine.json"
# nsenter enters the network, because `ip netns exec` would mount /sys anew and hide the control groups. docker-init is
# process 1, because dockerd does not reap the processes that its containers leave.
exec nsenter --net="$STATE/net/own" env "PATH=$STATE/bin:$PATH" docker-init -- dockerd \
    --config-file "$STATE/engine.json" --host "unix://$STATE/docker.sock" --pidfile "$STATE/docker.pid" \
    --data-root "$DATA" --exec-root "$STATE/exec" --storage-driver overlay2 \
    --bridge none --iptables=false --ip-forward=false \
    --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$CGROUP"
