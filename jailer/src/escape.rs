//! Ctrl-A commands in what a person types at a console.

/// Ctrl-A, which starts a command.
const ESCAPE: u8 = 1;

/// What the person asked for with Ctrl-A.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    /// Ctrl-A x.
    Leave,
}

/// Finds the commands.
#[derive(Default)]
pub(crate) struct EscapeReader {
    escaped: bool,
}

impl EscapeReader {
    /// Passes on all but commands, up to the first. Ctrl-A Ctrl-A is one Ctrl-A.
    pub(crate) fn pass(&mut self, typed: &[u8], out: &mut Vec<u8>) -> Option<Command> {
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') => return Some(Command::Leave),
                (true, ESCAPE) => out.push(ESCAPE),
                (false, ESCAPE) => self.escaped = true,
                (true, other) => out.extend([ESCAPE, other]),
                (false, other) => out.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_across_reads_and_ctrl_a_twice_is_one() {
        let mut reader = EscapeReader::default();
        let mut out = Vec::new();
        assert_eq!(reader.pass(b"ls\x01", &mut out), None);
        assert_eq!(reader.pass(b"\x01x", &mut out), None);
        assert_eq!(out, b"ls\x01x");
        assert_eq!(reader.pass(b"\x01", &mut out), None);
        assert_eq!(reader.pass(b"x", &mut out), Some(Command::Leave));
        assert_eq!(out, b"ls\x01x");
    }

    #[test]
    fn another_key_after_ctrl_a_passes_with_it() {
        let mut out = Vec::new();
        assert_eq!(EscapeReader::default().pass(b"\x01c", &mut out), None);
        assert_eq!(out, b"\x01c");
    }
}
