#!/usr/bin/env bash
# Builds the image of the Dockerfile (CPU) without a Docker engine, and trains in a container of it.
#
# Needs root on a Debian machine with buildah and debootstrap; takes some 3 minutes and 9 GB of disk. Where Docker Hub cannot
# be reached, Debian of the same release with its own Python, of the same minor version, stands in for the base image.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=$PATH:/usr/sbin:/sbin # where debootstrap and its helpers lie
work=$(mktemp -d)
mkdir "$work/tmp"
export TMPDIR=$work/tmp
trap 'echo "$0: line $LINENO failed" >&2' ERR
trap 'rm -rf --one-file-system "$work"' EXIT
fail() { echo "$0: $1; got: ${2:-nothing}" >&2 && exit 1; }
for tool in buildah debootstrap; do
    command -v $tool >/dev/null || fail "needs $tool: apt-get install buildah debootstrap"
done

export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$work/storage.conf
printf '[storage]\ndriver = "vfs"\nrunroot = "%s"\ngraphroot = "%s"\n' "$work/run" "$work/storage" >"$work/storage.conf"
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"
policy=(--signature-policy "$work/policy.json")

base=$(sed -n 's/^FROM //p' Dockerfile)
if ! buildah pull --quiet "${policy[@]}" "docker.io/library/$base" 2>"$work/pull"; then
    # Any other failure, as of a tag that does not exist, is one of the Dockerfile.
    grep -qE 'pinging container registry|no such host|dial tcp|timeout' "$work/pull" || fail "the base image" "$(cat "$work/pull")"
    release=${base##*-}
    stand_in=", on Debian's Python in place of $base"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$release" "$work/root" >"$work/debootstrap" ||
        fail "debootstrap" "$(tail -n 5 "$work/debootstrap")"
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$work/root" / >/dev/null
    buildah commit --quiet "${policy[@]}" "$container" "docker.io/library/$base" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$work/root"
fi

# pip in the build takes its index, its certificate and its folders of wheels from pip of this machine.
settings=$(python3 -m pip config list | sed -nE "s/^[a-z:]+\.(cert|index-url|find-links)='(.*)'$/\1 = \2/p" | sort -u -t = -k 1,1)
printf '[global]\n%s\n' "$settings" >"$work/pip.conf"
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r path; do
    if [ -e "$path" ]; then volumes+=(--volume "$path:$path:ro"); fi
done < <(grep -o '/[^ ]*' <<<"$settings")
buildah bud --pull-never --format docker "${policy[@]}" "${volumes[@]}" --build-arg TORCH_BUILD=cpu --tag felrec-dist:cpu . >"$work/build" 2>&1 ||
    fail "the build of the Dockerfile" "$(tail -n 20 "$work/build")"
grep '^STEP' "$work/build" || true

container=$(buildah from --pull-never felrec-dist:cpu)
inside() { buildah run "$container" -- "$@"; }
said() { # the words of HEALTHCHECK or CMD, one on a line
    buildah inspect --type image felrec-dist:cpu | python3 -c "
import json, sys
config = json.load(sys.stdin)['Docker']['config']
print(*{'HEALTHCHECK': config['Healthcheck']['Test'][1:], 'CMD': config['Cmd']}['$1'], sep='\n')"
}
mapfile -t healthcheck < <(said HEALTHCHECK)
mapfile -t cmd < <(said CMD)
inside "${healthcheck[@]}"
inside "${cmd[@]}" >"$work/help"
grep -q 'Usage: felrec' "$work/help" || fail "the image's command" "$(head "$work/help")"
version=$(inside python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $base == python:$version.* ]] || fail "Python of $base" "$version"
[ "$(inside id -u):$(inside id -g)" = 1000:1000 ] || fail "processes of the image are user 1000's" "$(inside id)"
inside test ! -w /app || fail "no process writes beside the package" "a writable /app"
inside python -m pip list >"$work/packages" 2>"$work/pip" || fail "pip list" "$(cat "$work/pip")"
if grep -iE '^(nvidia|cuda|triton|fbgemm.gpu +[0-9])' "$work/packages"; then fail "no CUDA package in the CPU build" "the above"; fi

inside timeout --kill-after=30 600 bash -c 'cd ~ && felrec synthesize raw.parquet --num-events 3000 --num-users 100 --num-items 80 &&
    felrec prepare parquet raw.parquet --out prepared --name demo --user user --item item --timestamp timestamp --timestamp-unit ms &&
    felrec train /app/configs/demo.yaml data.url=prepared run.url=run training.schedule.epochs=1' >"$work/train" 2>&1 ||
    fail "a training with two workers and two shards on Ray" "$(tail -n 30 "$work/train")"
tail -n 3 "$work/train"
echo "The image was built and trained in: $(buildah images --format '{{.Size}}' felrec-dist:cpu)${stand_in:-}."
