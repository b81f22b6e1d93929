//! The running kernel's version.

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
    fn the_running_kernel_has_the_version_that_procfs_says() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(super::release(), release.trim());
        assert!(version().is_some());
    }
}
