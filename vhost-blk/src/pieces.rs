//! Long requests, a piece at a time: a DISCARD of an image of small clusters looks at millions of them.

use std::io;

/// What is done at once, in bytes: whole clusters of any image.
const PIECE: u64 = 64 << 20;

/// Has `part` do what it does with the `length` bytes from `offset` of the disk, in pieces; after each, this thread is
/// known to get on.
///
/// # Errors
/// As `part`; what is left is not done then.
pub(crate) fn in_pieces(
    offset: u64,
    length: u64,
    mut part: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let next = end.min((at / PIECE + 1) * PIECE);
        part(at, next - at)?;
        vhost_daemon::progress();
        at = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_and_follow_each_other() {
        let mut pieces = Vec::new();
        let note = |at, length| {
            pieces.push((at, length));
            Ok(())
        };
        in_pieces(PIECE - 512, PIECE + 1024, note).unwrap();
        let whole = (PIECE, PIECE);
        assert_eq!(pieces, [(PIECE - 512, 512), whole, (2 * PIECE, 512)]);
        let mut calls = 0;
        let fail = |_, _| {
            calls += 1;
            Err(io::ErrorKind::StorageFull.into())
        };
        assert!(in_pieces(0, 2 * PIECE, fail).is_err());
        assert_eq!(calls, 1, "it went on after an error");
        in_pieces(512, 0, |_, _| Err(io::ErrorKind::Other.into())).unwrap();
    }
}
