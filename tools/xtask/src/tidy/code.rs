//! Rust source without its comments and literals: what is left is code, on
//! the same lines and in the same columns.

/// Replaces every byte of comments, strings and characters by a space.
pub(super) fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' if starts_raw(bytes, at) => raw_end(bytes, at),
            b'\'' => character_end(bytes, at),
            _ => at,
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    // Only whole characters outside literals are kept, so this loses nothing.
    String::from_utf8_lossy(&out).into_owned()
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |len| at + len)
}

fn comment_end(bytes: &[u8], at: usize) -> usize {
    let mut depth = 0usize;
    let mut end = at;
    while end < bytes.len() {
        match bytes.get(end..end + 2) {
            Some(b"/*") => {
                depth += 1;
                end += 2;
            }
            Some(b"*/") => {
                depth -= 1;
                end += 2;
                if depth == 0 {
                    return end;
                }
            }
            _ => end += 1,
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() {
        match bytes[end] {
            b'\\' => end += 2,
            b'"' => return end + 1,
            _ => end += 1,
        }
    }
    bytes.len()
}

/// Whether a raw string begins here: `r"`, `r#"`, but not the end of a name.
fn starts_raw(bytes: &[u8], at: usize) -> bool {
    let before = at.checked_sub(1).map(|index| bytes[index]);
    let in_name = before.is_some_and(|byte| byte != b'b' && is_word(byte));
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    !in_name && bytes.get(at + 1 + hashes) == Some(&b'"')
}

fn raw_end(bytes: &[u8], at: usize) -> usize {
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    let mut close = vec![b'"'];
    close.extend(std::iter::repeat_n(b'#', hashes));
    let inside = at + 2 + hashes;
    let found = bytes[inside..].windows(close.len()).position(|window| window == close);
    found.map_or(bytes.len(), |len| inside + len + close.len())
}

/// The end of a character literal, or `at` if this quote begins a lifetime.
fn character_end(bytes: &[u8], at: usize) -> usize {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes.iter().skip(at + 3).position(|byte| *byte == b'\'');
        return close.map_or(bytes.len(), |len| at + 3 + len + 1);
    }
    // One character of up to four bytes, then the closing quote.
    let Some(first) = bytes.get(at + 1) else { return at };
    let len = match first {
        0..0x80 => 1,
        0x80..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    };
    if bytes.get(at + 1 + len) == Some(&b'\'') { at + len + 2 } else { at }
}

/// Whether this byte can be part of a name.
pub(super) fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_go_and_code_stays_in_place() {
        let cases = [
            ("a // b\nc", "a     \nc"),
            ("a /* /* b */ */ c", "a               c"),
            (r#"a("b\"c") d"#, r"a(      ) d"),
            ("r#\"a\"b\"# c", "         c"),
            ("'\\'' 'x' 'static '\"' a", "         'static     a"),
            ("for r in x", "for r in x"),
        ];
        for (text, expected) in cases {
            assert_eq!(blank(text).trim_end(), expected.trim_end(), "{text}");
            assert_eq!(blank(text).len(), text.len());
        }
    }
}
