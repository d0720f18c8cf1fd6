//! What attacks aim at: a folder with a file and a socket, listeners, a terminal, a process. All
//! are the audit's own, and gone when it ends.
#![expect(unsafe_code, reason = "forks a process to be attacked")]

use super::order::Order;
use super::wall::Removed;
use crate::sandbox::Role;
use crate::tell::tell;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, chown, fork, mkdtemp, pause};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

/// Everything that attacks aim at.
pub(super) struct Targets {
    pub(super) folder: PathBuf,
    /// The slave's side: what a process would have as its console.
    pub(super) terminal: OwnedFd,
    _master: OwnedFd,
    port: u16,
    _listeners: (TcpListener, UnixListener, UnixListener),
    /// A word that other processes must not read.
    secret: Box<usize>,
}

impl Targets {
    pub(super) fn make() -> io::Result<Self> {
        let folder = mkdtemp(&std::env::temp_dir().join("bulkhead-audit-XXXXXX"))?;
        let inet = TcpListener::bind(("127.0.0.1", 0))?;
        let port = inet.local_addr()?.port();
        let socket = UnixListener::bind(folder.join("socket"))?;
        fs::set_permissions(folder.join("socket"), Permissions::from_mode(0o777))?;
        let name = SocketAddr::from_abstract_name(Order::abstract_name(port))?;
        let hidden = UnixListener::bind_addr(&name)?;
        // A full queue must not make a later probe wait.
        socket.set_nonblocking(true)?;
        hidden.set_nonblocking(true)?;
        inet.set_nonblocking(true)?;
        let terminal = openpty(None, None)?;
        fs::write(folder.join("kernel"), kernel())?;
        File::create(folder.join("disk"))?.set_len(1 << 20)?;
        fs::create_dir(folder.join("folder"))?;
        Ok(Self {
            folder,
            terminal: terminal.slave,
            _master: terminal.master,
            port,
            _listeners: (inet, socket, hidden),
            secret: Box::new(0x5EC_4E7),
        })
    }

    /// Gives the folder to the user that this process is about to become.
    pub(super) fn give_to(&self, uid: Uid, gid: Gid) -> io::Result<()> {
        Ok(chown(&self.folder, Some(uid), Some(gid))?)
    }

    /// Lets every user in: probes may be others. Not before root is left: a stranger may put what he likes
    /// in there too.
    pub(super) fn open_to_all(&self) -> io::Result<()> {
        fs::set_permissions(&self.folder, Permissions::from_mode(0o777))
    }

    /// Mends what an attack that got through has changed, and takes its connections.
    pub(super) fn renew(&self) -> io::Result<()> {
        let (inet, socket, hidden) = &self._listeners;
        while inet.accept().is_ok() {}
        while socket.accept().is_ok() || hidden.accept().is_ok() {}
        for name in ["secret", "new"] {
            let path = self.folder.join(name);
            // At most one of them is there.
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
        }
        // Made anew, and by its descriptor: a link that a stranger put there is not followed.
        let mut secret = File::create_new(self.folder.join("secret"))?;
        secret.write_all(b"secret")?;
        secret.set_permissions(Permissions::from_mode(0o666))
    }

    pub(super) fn order(&self, role: Role, attack: &str, removed: Removed, victim: &Victim) -> Order {
        Order {
            role,
            attack: attack.to_owned(),
            removed,
            report: 0,
            victim: victim.0.as_raw(),
            secret: &raw const *self.secret as usize,
            port: self.port,
            folder: self.folder.clone(),
        }
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.folder) {
            tell(format_args!(
                "bulkhead: cannot remove {}: {e}",
                self.folder.display()
            ));
        }
    }
}

/// A process that does nothing; killed when dropped.
pub(super) struct Victim(Pid);

impl Victim {
    /// As the current user, with our memory.
    pub(super) fn start() -> io::Result<Self> {
        // SAFETY: this process has one thread, so the child may do whatever the parent might.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self(child)),
            ForkResult::Child => {
                // It dies with us, and else only by our hand.
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                loop {
                    pause();
                }
            }
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// The smallest image that the vmm takes: an ELF with a PVH note and one `hlt`. No probe runs it.
fn kernel() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    const NOTE: u64 = 176;
    const CODE: u64 = 200;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    // ET_EXEC, EM_X86_64.
    for half in [2u16, 62] {
        out.extend(half.to_le_bytes());
    }
    out.extend(1u32.to_le_bytes());
    // e_entry, e_phoff, e_shoff, then e_flags.
    for word in [u64::from(ENTRY), 64, 0] {
        out.extend(word.to_le_bytes());
    }
    out.extend(0u32.to_le_bytes());
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
    for half in [64u16, 56, 2, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    // PT_LOAD, then PT_NOTE: type, flags, offset, vaddr, paddr, filesz, memsz, align.
    for (kind, offset, address, size) in [(1u32, CODE, u64::from(ENTRY), 1u64), (4, NOTE, 0, 20)] {
        out.extend(kind.to_le_bytes());
        out.extend(5u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            out.extend(word.to_le_bytes());
        }
    }
    // XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4u32, 4, 18] {
        out.extend(word.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(ENTRY.to_le_bytes());
    out.resize(CODE as usize, 0);
    out.push(0xF4);
    out
}
