# What several scripts share; read with `.`, not run.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
# Tools that the tests and the demonstration need and Debian doesn't have.
tools=$target/tools
# A rustup that was just installed isn't in the PATH of a running shell.
PATH=$PATH:${CARGO_HOME:-${HOME:-}/.cargo}/bin

die() { echo "${0##*/}: $*" >&2; exit 1; }

# As root: as it is, or by sudo.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# need_packages COMMAND:PACKAGE...: installs the packages whose command isn't there.
need_packages() {
  local pair missing=()
  for pair; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

# install_packages PACKAGE...: by apt; with words to go by where there is no apt, or no right to use it.
install_packages() {
  command -v apt-get >/dev/null || die "please install, by your system's own means: $*"
  [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || die "please install as root: apt-get install $*"
  echo "${0##*/}: installing $*" >&2
  # Lists may be old or, in a fresh container, empty: try, then update and try again.
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null 2>&1 || {
    as_root apt-get update -qq >&2
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >&2
  } || die "apt-get install $* failed"
}

# not_roots_clone: ends where root would build in a clone of somebody else's. Cargo would leave files
# there that its owner can't replace, and root seldom has Rust.
not_roots_clone() {
  local owner
  owner=$(stat -c %U "$root")
  [ "$(id -u)" -ne 0 ] || [ "$(stat -c %u "$root")" -eq 0 ] ||
    die "this clone belongs to $owner, and root building in it would leave files that $owner can't replace: $1"
}

# What building takes: Rust, which is yours to install, and a C compiler with a static libc.
need_compilers() {
  command -v cargo >/dev/null || die "Rust is missing: see https://rustup.rs"
  need_packages gcc:gcc
  # Also where gcc is there, the headers and libc.a may not be.
  echo 'int main(void) { return 0; }' | gcc -static -x c -o /dev/null - 2>/dev/null || install_packages libc6-dev
}

# count_results LOG...: adds up what the test executables say at their ends.
count_results() {
  read -r tests_passed tests_failed tests_skipped < <(
    sed -n 's/.*test result: [a-zA-Z]*\. \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored.*/\1 \2 \3/p' "$@" |
      awk '{ passed += $1; failed += $2; skipped += $3 } END { print passed + 0, failed + 0, skipped + 0 }'
  )
}

# How long Docker may take to start and to end, in seconds.
docker_limit_s=60

# start_docker DIRECTORY [DOCKERD ARGUMENT]...: a Docker Engine of one's own, as root: with all of its
# files in DIRECTORY, cgroups of that name, and no network. What is missing is installed. $docker_socket is its socket.
# Beside runc it knows the runtime `second`: crun, or where that has no cgroups that it likes, runc.
start_docker() {
  local second give_up
  [ "$(id -u)" -eq 0 ] || { echo "${0##*/}: only root can start a Docker" >&2; return 1; }
  second=runc
  [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ] || second=crun
  # From Debian 13 on, `docker` has a package of its own. Who can't install anything goes without.
  (need_packages dockerd:docker.io "$second:$second" && need_packages docker:docker-cli) || return 1
  second=$(PATH=$PATH:/usr/sbin:/sbin command -v "$second")

  docker_directory=$1 docker_socket=$1/docker.sock
  shift
  # It makes these wherever its own files are.
  docker_strays=()
  local stray
  for stray in /run/docker /run/containerd /etc/docker; do
    [ -e "$stray" ] || docker_strays+=("$stray")
  done
  mkdir -p "$docker_directory"
  # Beside much other work its containerd may not be there in time. Then it ends, and systemd
  # would start it again.
  local attempt
  for attempt in 1 2 3; do
    PATH=$PATH:/usr/sbin:/sbin dockerd --host "unix://$docker_socket" --pidfile "$docker_directory/pid" \
      --data-root "$docker_directory/data" --exec-root "$docker_directory/run" \
      --cgroup-parent "${docker_directory##*/}" --add-runtime "second=$second" \
      --bridge none --ip-forward=false --iptables=false --ip6tables=false "$@" \
      >>"$docker_directory/log" 2>&1 </dev/null &
    dockerd=$!
    give_up=$((SECONDS + docker_limit_s))
    while kill -0 "$dockerd" 2>/dev/null && [ $SECONDS -lt $give_up ]; do
      ! docker --host "unix://$docker_socket" info >/dev/null 2>&1 || return 0
      sleep 0.2
    done
    echo "${0##*/}: Docker doesn't start ($attempt of 3):" >&2
    tail -n 20 "$docker_directory/log" >&2
    stop_docker
  done
  return 1
}

# stop_docker: ends it, and leaves nothing of it but what is in its directory.
stop_docker() {
  local give_up=$((SECONDS + docker_limit_s))
  kill -TERM "$dockerd" 2>/dev/null || :
  while kill -0 "$dockerd" 2>/dev/null; do
    [ $SECONDS -lt $give_up ] || kill -KILL "$dockerd"
    sleep 0.1
  done
  wait "$dockerd" 2>/dev/null || :
  # One that didn't end in order leaves processes, their sockets, and mounts.
  local mount shim socket
  for shim in "$docker_directory"/run/containerd/daemon/io.containerd.runtime.v2.task/moby/*/; do
    [ -e "$shim/shim.pid" ] || continue
    kill -KILL "$(cat "$shim/shim.pid")" 2>/dev/null || :
    socket=$(cat "$shim/address" 2>/dev/null) || :
    case $socket in unix:///run/containerd/s/*) rm -f "${socket#unix://}" ;; esac
  done
  while read -r mount; do umount --lazy "$mount" || :; done < <(
    cut -d' ' -f5 /proc/self/mountinfo | grep "^$docker_directory/" | sort -r
  )
  # Cgroups are empty now; so are directories in which nobody else has anything.
  find /sys/fs/cgroup -depth -type d -name "${docker_directory##*/}" -exec rmdir {} + 2>/dev/null || :
  [ ${#docker_strays[@]} -eq 0 ] || {
    case " ${docker_strays[*]} " in *' /etc/docker '*) rm -f /etc/docker/key.json ;; esac
    find "${docker_strays[@]}" -depth -type d -empty -delete 2>/dev/null || :
  }
}
