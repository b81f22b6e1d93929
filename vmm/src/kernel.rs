//! The running kernel: its version, and whether it gives huge pages.

/// Its release, as `uname -r` prints it.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Its major and minor version; `None` when the release has none.
pub fn version() -> Option<(u32, u32)> {
    version_of(&release())
}

/// Major and minor version out of a release such as `6.12.95+deb13-amd64`.
pub fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-', '+', '~']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether it gives this process pages of 2 MiB when it asks for them, as far as that can be known beforehand.
pub fn gives_huge_pages() -> bool {
    const HERE: &str = "/sys/kernel/mm/transparent_hugepage";
    // SAFETY: this prctl takes numbers only.
    let forbidden = unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) } != 0;
    let chosen = |file: &str| std::fs::read_to_string(format!("{HERE}/{file}")).ok();
    // Before Linux 6.8 there is one switch for all sizes.
    let of_size = chosen("hugepages-2048kB/enabled").filter(|words| !words.contains("[inherit]"));
    let words = of_size.or_else(|| chosen("enabled"));
    !forbidden && words.is_some_and(|words| allows(&words))
}

/// Whether one of the words that stand for "when asked" is chosen: `always [madvise] never`.
fn allows(words: &str) -> bool {
    words.contains("[always]") || words.contains("[madvise]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases() {
        assert_eq!(version_of("6.12.95+deb13-amd64"), Some((6, 12)));
        assert_eq!(version_of("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version_of("7.0-rc1"), Some((7, 0)));
        assert_eq!(version_of("6.12~rc1"), Some((6, 12)));
        assert_eq!(version_of("unknown"), None);
        assert_eq!(version_of(""), None);
    }

    #[test]
    fn huge_pages_are_given_to_who_asks_unless_the_host_says_never() {
        assert!(allows("always [madvise] never\n") && allows("[always] inherit madvise never\n"));
        assert!(!allows("always madvise [never]\n") && !allows(""));
    }

    /// The switch of a process and its children: nobody gets huge pages who is forbidden them.
    #[test]
    fn a_process_that_is_forbidden_huge_pages_does_not_count_on_them() {
        let before = gives_huge_pages();
        // SAFETY: this prctl takes numbers only; nextest gives each test a process of its own.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
        assert!(!gives_huge_pages());
        // SAFETY: as above.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0) };
        assert_eq!(gives_huge_pages(), before);
    }

    #[test]
    fn the_running_kernel_has_the_version_that_procfs_says() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(super::release(), release.trim());
        assert!(version().is_some());
    }
}
