#!/bin/sh
# node.sh install|uninstall [argument of `nydusctl node`]...
#
# What the image's container does in a pod: puts the bundle onto the node it runs on (/opt/nydus-py, mounted at /host),
# has that node's own python3 run it, and runs `nydusctl node` in the node's namespaces. The pod needs hostPID and
# privileged. It stays, and is ready, when the node is as asked; a refusal (containers that use the snapshotter) is said and
# tried again every $RETRY seconds.
set -eu

BUNDLE=/nydus-py
HOST=/host
PLACE=/opt/nydus-py
READY=/run/node-ready
# what people call by name, and containerd: nydus-overlayfs is a mount helper
LINKS="nydusctl nydusify nydus-image ctr-remote nydus-overlayfs"
: "${RETRY:=30}"

say() { printf '%s\n' "$*"; }
on_node() { nsenter --target 1 --mount --uts --ipc --net -- "$@"; }

# The newest Python of the node that the bundle has packages for.
use_python() {
    for place in $(cd "$HOST/bundle/lib" && printf '%s\n' python3.* | sort -t. -k2 -rn) python3; do
        if on_node "$PLACE/bundle/bin/use-python" "$place" 2>/dev/null; then return 0; fi
    done
    say "this node has none of $(cd "$HOST/bundle/lib" && echo python3.*): install one of them"
    return 1
}

copy() {
    if cmp -s "$BUNDLE/BUILD" "$HOST/bundle/BUILD"; then return 0; fi
    rm -rf "$HOST/bundle.new" "$HOST/bundle.old"
    cp -a "$BUNDLE" "$HOST/bundle.new"
    if [ -d "$HOST/bundle" ]; then mv "$HOST/bundle" "$HOST/bundle.old"; fi
    # the same path as before: a nydusd that is to go over to new code looks for it there
    mv "$HOST/bundle.new" "$HOST/bundle"
}

# Running containers read on through the restart and the change of code.
upgrade() {
    if [ ! -d "$HOST/bundle.old" ]; then return 0; fi
    if on_node systemctl is-active --quiet containerd-nydus-grpc.service; then
        on_node systemctl restart containerd-nydus-grpc.service
        on_node timeout 120 "$PLACE/bundle/bin/nydusctl" snapshotter upgrade --wait 30 || say "some nydusd keep the code they have"
    fi
    rm -rf "$HOST/bundle.old"
}

install() {
    copy
    use_python
    upgrade
    if [ -e /config/config.json ]; then cp /config/config.json "$HOST/config.json"; set -- --config "$PLACE/config.json" "$@"; fi
    on_node "$PLACE/bundle/bin/nydusctl" node install --bin "$PLACE/bundle/bin" "$@"
    for name in $LINKS; do
        on_node sh -c '[ -e "$2" ] || ln -sfn "$1" "$2"' sh "$PLACE/bundle/bin/$name" "/usr/local/bin/$name"
    done
}

uninstall() {
    if [ ! -x "$HOST/bundle/bin/nydusctl" ]; then say "this node has no $PLACE/bundle"; return 0; fi
    on_node "$PLACE/bundle/bin/nydusctl" node uninstall "$@"
    for name in $LINKS; do
        on_node sh -c '[ "$(readlink "$2")" != "$1" ] || rm "$2"' sh "$PLACE/bundle/bin/$name" "/usr/local/bin/$name"
    done
    rm -rf "$HOST/bundle" "$HOST/config.json"
}

command=${1:-}
case $command in
    now-install | now-uninstall) shift; "${command#now-}" "$@"; exit ;;
    install | uninstall) shift ;;
    *) sed -n '2s/^# //p' "$0" >&2; exit 2 ;;
esac
trap 'exit 0' TERM INT
rm -f "$READY"
# in a shell of its own: `set -e` does not reach into a condition
until "$0" "now-$command" "$@"; do
    say "node $command did not succeed; again in $RETRY s"
    sleep "$RETRY" &
    wait $!
done
touch "$READY"
say "node $command: done"
while :; do
    sleep 3600 &
    wait $!
done
