//! Clients that listen to the console, or to the log: each has what was said last, and from then on
//! what is said. A slow one loses some, and is told how much; nobody waits for it, but for a moment at the
//! VM's end.

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::{AsRawFd, OwnedFd};

/// Most listeners to one thing; clients with orders have places left.
pub(super) const MOST_LISTENERS: usize = 3;
/// Most bytes held for one.
const MOST_PENDING: usize = 64 << 10;
/// Bytes of one datagram.
const PIECE: usize = 4096;

/// Those that listen to one thing.
pub(super) struct Audience {
    /// The last of what was said, and some before it.
    recent: Vec<u8>,
    /// How many bytes of it a new listener hears.
    remembered: usize,
    all: Vec<Listener>,
}

struct Listener {
    socket: OwnedFd,
    pending: Vec<u8>,
    lost: u64,
    /// It leaves when it has heard what there is.
    leaving: bool,
}

impl Audience {
    /// A new listener hears the last `remembered` bytes.
    pub(super) fn new(remembered: usize) -> Self {
        Self {
            recent: Vec::new(),
            remembered,
            all: Vec::new(),
        }
    }

    /// Says it to all.
    pub(super) fn hear(&mut self, bytes: &[u8]) {
        self.recent.extend_from_slice(bytes);
        if self.recent.len() >= 2 * self.remembered {
            // And the byte before, which tells whether they begin a line.
            self.recent.drain(..self.recent.len() - self.remembered - 1);
        }
        for listener in &mut self.all {
            listener.hear(bytes);
        }
    }

    /// The last of what was said; with `lines`, from the beginning of one.
    fn recent(&self, lines: bool) -> &[u8] {
        let Some(over) = self.recent.len().checked_sub(self.remembered).filter(|n| *n > 0) else {
            return &self.recent;
        };
        let last = &self.recent[over..];
        let whole = self.recent[over - 1] == b'\n';
        if !lines || whole {
            return last;
        }
        let end = last.iter().position(|byte| *byte == b'\n');
        end.map_or(&[], |end| &last[end + 1..])
    }

    /// How many they are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Whether there is room for another, now that those who are gone are gone.
    pub(super) fn has_room(&mut self) -> bool {
        self.all.retain(Listener::is_there);
        self.all.len() < MOST_LISTENERS
    }

    /// Adds one; with `lines` it hears whole lines only. Without `follow` it hears no more than there is.
    pub(super) fn admit(&mut self, socket: OwnedFd, lines: bool, follow: bool) {
        let pending = self.recent(lines).to_vec();
        self.all.push(Listener {
            socket,
            pending,
            lost: 0,
            leaving: !follow,
        });
    }

    /// What to wait for; what they say is wanted only where there is room for it.
    pub(super) fn sources(&self, wanted: bool) -> impl Iterator<Item = (&OwnedFd, PollFlags)> {
        self.all.iter().map(move |listener| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, wanted);
            flags.set(PollFlags::POLLOUT, listener.has_work());
            (&listener.socket, flags)
        })
    }

    /// Serves those for which a poll of [`Self::sources`] found something. What they say goes to `said`,
    /// if that is wanted.
    pub(super) fn serve(&mut self, found: &[PollFlags], mut said: Option<&mut Vec<u8>>) {
        let mut found = found.iter().copied();
        self.all.retain_mut(|listener| {
            let found = found.next().unwrap_or(PollFlags::empty());
            let stays = found.is_empty() || listener.answer(found, said.as_deref_mut());
            stays && listener.work()
        });
    }

    /// Gives all of them what can be given at once; whether nothing is left to give.
    pub(super) fn drained(&mut self) -> bool {
        self.all.retain_mut(Listener::work);
        !self.all.iter().any(Listener::has_work)
    }
}

impl Listener {
    fn hear(&mut self, bytes: &[u8]) {
        if self.leaving {
            return;
        }
        if self.lost == 0 && self.pending.len() + bytes.len() <= MOST_PENDING {
            self.pending.extend_from_slice(bytes);
        } else {
            self.lost += bytes.len() as u64;
        }
    }

    fn has_work(&self) -> bool {
        !self.pending.is_empty() || self.lost > 0 || self.leaving
    }

    /// Hears what it says; false: it is gone, or says what nobody wants.
    fn answer(&self, found: PollFlags, said: Option<&mut Vec<u8>>) -> bool {
        let Some(said) = said else {
            return !found.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR);
        };
        let mut bytes = [0; 256];
        match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => false,
            Ok(count) => {
                said.extend_from_slice(&bytes[..count]);
                true
            }
            Err(error) => matches!(error, Errno::EAGAIN | Errno::EINTR),
        }
    }

    fn is_there(&self) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        match recv(self.socket.as_raw_fd(), &mut [0; 1], flags) {
            Ok(count) => count > 0,
            Err(error) => matches!(error, Errno::EAGAIN | Errno::EINTR),
        }
    }

    /// Sends what can be sent at once; false: it is gone, or was to hear no more than this.
    fn work(&mut self) -> bool {
        loop {
            if self.pending.is_empty() && self.lost > 0 {
                let note = format!("\n[{} bytes were lost]\n", self.lost);
                self.pending = note.into_bytes();
                self.lost = 0;
            }
            if self.pending.is_empty() {
                return !self.leaving;
            }
            let piece = &self.pending[..self.pending.len().min(PIECE)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), piece, flags) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(error) => return error == Errno::EAGAIN,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// A listener, and its end of the socket.
    fn listener(audience: &mut Audience, lines: bool, follow: bool) -> OwnedFd {
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        audience.admit(ours, lines, follow);
        theirs
    }

    /// What is there, and whether that was all that will come.
    fn heard(socket: &OwnedFd) -> (Vec<u8>, bool) {
        let mut all = Vec::new();
        let mut bytes = [0; PIECE];
        loop {
            match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return (all, true),
                Ok(count) => all.extend_from_slice(&bytes[..count]),
                Err(Errno::EAGAIN) => return (all, false),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn say(text: &[u8], to: &OwnedFd) {
        assert_eq!(send(to.as_raw_fd(), text, MsgFlags::MSG_NOSIGNAL), Ok(text.len()));
    }

    #[test]
    fn a_listener_hears_the_last_of_what_was_said_and_what_is() {
        let mut audience = Audience::new(8);
        audience.hear(b"one\ntwo\nthree\n");
        let (all, lines) = (
            listener(&mut audience, false, true),
            listener(&mut audience, true, true),
        );
        audience.hear(b"x");
        assert!(audience.drained());
        assert_eq!(heard(&all), (b"o\nthree\nx".to_vec(), false));
        assert_eq!(heard(&lines), (b"three\nx".to_vec(), false));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_whole_lines_where_wanted() {
        for count in 0..60 {
            let mut audience = Audience::new(10);
            (0..count).for_each(|n| audience.hear(format!("l{n}\n").as_bytes()));
            assert!(audience.recent.len() < 20);
            let text = String::from_utf8(audience.recent(true).to_vec()).unwrap();
            let wanted: Vec<_> = (0..count).map(|n| format!("l{n}\n")).collect();
            assert!(wanted.concat().ends_with(&text), "{count}: {text:?}");
            assert!(
                text.len() + 4 > 10.min(wanted.concat().len()),
                "{count}: {text:?}"
            );
            assert!(text.is_empty() || text.starts_with('l'), "{count}: {text:?}");
        }
    }

    #[test]
    fn who_asks_for_no_more_than_there_is_leaves() {
        let mut audience = Audience::new(100);
        audience.hear(b"before\n");
        let socket = listener(&mut audience, true, false);
        audience.hear(b"after\n");
        assert!(audience.drained());
        assert_eq!(heard(&socket), (b"before\n".to_vec(), true));
        assert_eq!(audience.count(), 0);
    }

    #[test]
    fn a_slow_listener_loses_a_counted_part_and_delays_nobody() {
        let mut audience = Audience::new(100);
        let (slow, quick) = (
            listener(&mut audience, false, true),
            listener(&mut audience, false, true),
        );
        let mut all = Vec::new();
        for n in 0..2000_u32 {
            let text = format!("{n:0999}\n");
            audience.hear(text.as_bytes());
            audience.serve(&[PollFlags::POLLOUT; 2], Some(&mut Vec::new()));
            all.extend(heard(&quick).0);
            assert!(audience.all.iter().all(|one| one.pending.len() <= MOST_PENDING));
        }
        assert_eq!(all.len(), 2_000_000);
        let mut got = heard(&slow).0;
        while !audience.drained() {
            got.extend(heard(&slow).0);
        }
        got.extend(heard(&slow).0);
        let text = String::from_utf8(got).unwrap();
        let (kept, note) = text.split_once("\n[").expect("is told what was lost");
        assert!(all.starts_with(kept.as_bytes()));
        let lost = all.len() - kept.len();
        assert!(lost > 1_000_000, "{lost}");
        assert_eq!(note, format!("{lost} bytes were lost]\n"));
    }

    #[test]
    fn what_is_typed_is_taken_where_there_is_room_and_who_speaks_out_of_turn_goes() {
        let mut audience = Audience::new(100);
        let socket = listener(&mut audience, false, true);
        say(b"ls\n", &socket);
        let mut typed = Vec::new();
        audience.serve(&[PollFlags::POLLIN], Some(&mut typed));
        assert_eq!(typed, b"ls\n");
        assert!(audience.sources(false).all(|(_, flags)| flags.is_empty()));
        drop(socket);
        // Nothing is wanted of it, but it is gone: that must not wake us for ever.
        audience.serve(&[PollFlags::POLLHUP], None);
        assert_eq!(audience.count(), 0);
        let socket = listener(&mut audience, true, true);
        say(b"x", &socket);
        audience.serve(&[PollFlags::POLLIN], None);
        assert_eq!(audience.count(), 0);
    }

    #[test]
    fn who_is_gone_takes_no_place_and_who_has_something_to_say_keeps_it() {
        let mut audience = Audience::new(100);
        let mut sockets: Vec<_> = (0..MOST_LISTENERS)
            .map(|_| listener(&mut audience, false, true))
            .collect();
        say(b"x", &sockets[0]);
        assert!(!audience.has_room());
        sockets.pop();
        assert!(audience.has_room());
        assert_eq!(audience.count(), MOST_LISTENERS - 1);
    }
}
