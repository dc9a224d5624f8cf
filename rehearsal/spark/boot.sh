#!/bin/sh
# The inside of one stand-in Spark: started in mount, process and host-name namespaces of its own, ends as its Docker
# Engine. Whatever is mounted or written here below /etc, /opt, /run, /dev and /proc is seen by nobody else.
#   boot.sh STATE HOSTNAME NETNS CGROUP_FILE INFINIBAND(1|0)
set -eu
STATE=$1 HOSTNAME=$2 NETNS=$3 CGROUP_FILE=$4 INFINIBAND=$5

echo 0 > "$CGROUP_FILE"
echo "$HOSTNAME" > /proc/sys/kernel/hostname

mkdir -p "$STATE/net" "$STATE/private"
touch "$STATE/net/own" "$STATE/net/machine"
mount --bind "/run/netns/$NETNS" "$STATE/net/own"
mount --bind /proc/self/ns/net "$STATE/net/machine"
mount -t tmpfs -o mode=755 rehearsal "$STATE/private"

# dockerd and containerd leave keys, folders and sockets there, and would use a containerd that runs on this machine.
for folder in etc opt run; do
    mkdir -p "/$folder" "$STATE/private/$folder/upper" "$STATE/private/$folder/work"
    mount -t overlay -o \
        "lowerdir=/$folder,upperdir=$STATE/private/$folder/upper,workdir=$STATE/private/$folder/work" overlay "/$folder"
done
mkdir -p /run/containerd
mount -t tmpfs -o mode=711 rehearsal /run/containerd
rm -f /etc/hosts /etc/resolv.conf
cp "$STATE/etc/hosts" "$STATE/etc/resolv.conf" /etc/

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
if [ "$INFINIBAND" = 1 ]; then
    mkdir "$STATE/private/dev/infiniband"
    mknod "$STATE/private/dev/infiniband/uverbs0" c 1 3
fi
mount --rbind "$STATE/private/dev" /dev
mount -t proc proc /proc

# By nsenter, because `ip netns exec` mounts /sys anew and hides the control groups; an init, because dockerd as
# process 1 would never reap what its containers leave behind.
exec nsenter --net="$STATE/net/own" \
    env "PATH=$STATE/bin:$PATH" docker-init -- dockerd --config-file "$STATE/engine.json"
