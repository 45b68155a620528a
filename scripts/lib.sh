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
