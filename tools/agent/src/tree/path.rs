//! Names that arrive from the other side.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::TreeError;

/// Longest path below the top of a tree, in bytes (the kernel's `PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Bytes from the wire as a path.
pub(crate) fn to_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Accepts a path below the top of a tree: plain names joined by slashes.
pub(super) fn check_relative(path: &[u8]) -> Result<(), TreeError> {
    if path.len() > MAX_PATH {
        return Err(hostile(path, "its path is too long"));
    }
    path.split(|&byte| byte == b'/').try_for_each(check_name).map_err(|why| hostile(path, why))
}

/// Accepts the name of one file.
pub(super) fn check_top(name: &[u8]) -> Result<(), TreeError> {
    if name.contains(&b'/') {
        return Err(hostile(name, "a name has no slash"));
    }
    check_name(name).map_err(|why| hostile(name, why))
}

fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" => Err("it has an empty component"),
        b"." | b".." => Err("it would leave its directory"),
        _ if name.contains(&0) => Err("it contains a NUL byte"),
        _ => Ok(()),
    }
}

pub(super) fn hostile(name: &[u8], why: &'static str) -> TreeError {
    TreeError::Hostile { name: String::from_utf8_lossy(name).into_owned(), why }
}

/// Splits a checked path into its directory (empty for the root) and name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_accepted() {
        for good in ["a", "a/b", ".hidden", "..a", "a/...", "\u{e4}"] {
            assert!(check_relative(good.as_bytes()).is_ok(), "{good}");
        }
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "a\0b"] {
            assert!(check_relative(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(check_relative(&[b'a'; MAX_PATH + 1]).is_err());
        assert!(check_top(b"a/b").is_err());
        assert!(check_top(b"..").is_err());
    }

    #[test]
    fn splits_at_the_last_slash() {
        assert_eq!(split(b"a"), (&b""[..], &b"a"[..]));
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
    }
}
