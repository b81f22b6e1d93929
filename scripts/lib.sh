# shellcheck shell=bash
# What scripts/rig and scripts/guest share: messages, the cache, Debian packages, kernel modules. Sourced, not run.

# The checkout this script belongs to, and the directory for everything that can be made again.
CHECKOUT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
CACHE=${BALLAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ballast}
export CHECKOUT CACHE

# Messages go to standard error: standard output belongs to the command, or to what the caller parses.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$*"
    exit 125
}

# Prints the comment at the head of the calling script, which is its manual.
usage() { sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"; }

# One writer at a time in the cache; readers are safe because files are renamed into place.
lock_cache() {
    mkdir -p "$CACHE" || die "cannot create the cache directory $CACHE; set BALLAST_CACHE to a directory you can write"
    exec {CACHE_LOCK}>"$CACHE/.lock"
    flock -n "$CACHE_LOCK" || { say "waiting for another script that is filling $CACHE"; flock "$CACHE_LOCK"; }
}
unlock_cache() { exec {CACHE_LOCK}>&-; }

# scratch NAME makes a directory in the cache that remove_scratch removes; it carries the process id, because it is
# called in a subshell that cannot keep a list.
scratch() { mktemp -d "$CACHE/$1.$$.XXXXXX"; }
remove_scratch() { rm -rf "$CACHE"/*."$$".??????; }

# Can this user run guests with limits on this machine's KVM, and is that a KVM that runs Linux?
can_run_guests() { [ -w /dev/kvm ] && [ -w /dev/userfaultfd ]; }
can_run_linux() { can_run_guests && { [ -e /sys/module/kvm_intel ] || [ -e /sys/module/kvm_amd ]; }; }

# need COMMAND:PACKAGE... installs the packages whose command is missing. That takes root.
need() {
    local pair missing=()
    for pair; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null 2>&1 ||
        die "missing: ${missing[*]} (Debian's names); this system has no apt-get, so install them its own way"
    [ "$(id -u)" -eq 0 ] || die "missing packages; run: sudo apt-get install --no-install-recommends ${missing[*]}"
    say "installing ${missing[*]}"
    ensure_package_lists
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt-get could not install ${missing[*]}; its message is above"
}

# ensure_package_lists fetches apt's lists unless they were fetched today: old ones name packages that the mirrors no longer
# have and none of the new kernels. Who may not fetch them, or cannot, goes on with those that are there.
ensure_package_lists() {
    if [ -n "$(apt-cache search --names-only '^linux-image-.*amd64$' 2>/dev/null | head -1)" ]; then
        [ -z "$(find /var/lib/apt/lists/partial -maxdepth 0 -mtime -1 2>/dev/null)" ] || return 0
        if [ "$(id -u)" -ne 0 ]; then
            say "the package lists are older than a day; if a package is not found: sudo apt-get update"
        else
            say "the package lists are older than a day (apt-get update)"
            apt-get update -qq >&2 || say "apt-get update failed, its message is above; going on with the old lists"
        fi
        return 0
    fi
    [ "$(id -u)" -eq 0 ] || die "the package lists are missing; run: sudo apt-get update"
    say "fetching the package lists (apt-get update)"
    apt-get update -qq >&2 || die "apt-get update failed; its message is above"
}

# find_package REGEX... prints the newest package that matches the first expression with any match.
find_package() {
    local regex found
    for regex; do
        found=$(apt-cache search --names-only "$regex" | awk '{print $1}' | grep -Ev -e '-(dbg|unsigned)$' |
            sort -V | tail -1)
        [ -n "$found" ] && { printf '%s\n' "$found"; return; }
    done
    return 1
}

# unpack_package NAME DIR unpacks a package without installing it: no root, and /boot stays as it is.
unpack_package() {
    local name=$1 dir=$2 deb
    say "downloading $name"
    mkdir -p "$dir"
    (cd "$dir" && apt-get download -qq "$name" 2>"$dir/apt.log" >&2) || {
        cat "$dir/apt.log" >&2
        die "apt-get could not download $name; is the package list old? (sudo apt-get update)"
    }
    for deb in "$dir"/*.deb; do
        dpkg -x "$deb" "$dir" || die "cannot unpack $deb"
        rm -f "$deb"
    done
}

# expand FILE prints a kernel module, decompressed by the ending of its name.
expand() {
    case $1 in
        *.xz) xz -dc "$1" ;;
        *.zst) zstd -qdc "$1" ;;
        *.gz) gzip -dc "$1" ;;
        *) cat "$1" ;;
    esac
}

# copy_modules TREE DIR MODULE... puts modules and what they depend on into DIR, decompressed, and appends their file
# names to DIR/order, in the order to load them. Reads each module's own `depends=` rather than modules.dep, which a
# package that was not installed does not have. A name that is nowhere in TREE is taken to be built in.
copy_modules() {
    local tree=$1 dir=$2 name file out depends
    shift 2
    mkdir -p "$dir"
    touch "$dir/order"
    for name; do
        out=${name//-/_}.ko
        [ -e "$dir/$out" ] && continue
        file=$(find "$tree" -regex ".*/${name//[-_]/[-_]}\.ko\(\.xz\|\.zst\|\.gz\)?" | head -1)
        [ -n "$file" ] || continue
        expand "$file" >"$dir/$out" || die "cannot decompress $file"
        depends=$(tr '\0' '\n' <"$dir/$out" | sed -n 's/^depends=//p' | tr ',' ' ')
        # shellcheck disable=SC2086  # a list of names
        [ -n "$depends" ] && copy_modules "$tree" "$dir" $depends
        echo "$out" >>"$dir/order"
    done
}

# pack DIR FILE makes an initramfs of DIR.
pack() {
    (cd "$1" && find . | LC_ALL=C sort | busybox cpio -o -H newc 2>/dev/null) | gzip -1n >"$2.new" && mv "$2.new" "$2"
}

# ensure_program NAME PACKAGE puts a program of a Debian package at $CACHE/NAME, without installing it: nothing of it is started.
ensure_program() {
    local tmp package
    [ -x "$CACHE/$1" ] && return
    package=$(find_package "^$2\$") || die "no package $2 in apt's lists"
    tmp=$(scratch "$1")
    unpack_package "$package" "$tmp"
    mv "$(find "$tmp" -path "*bin/$1" -type f | head -1)" "$CACHE/$1"
    rm -rf "$tmp"
}

# ensure_busybox puts a static busybox at $CACHE/busybox and makes it known to `pack`.
ensure_busybox() { ensure_program busybox busybox-static; }
busybox() { "$CACHE/busybox" "$@"; }
