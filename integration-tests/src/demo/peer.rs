//! The TAP's other side: a process in a user and network namespace of its own, made without
//! root, that owns the TAP, has an address on it, serves one page by HTTP and echoes on another port.
//!
//! It talks to the demo over its standard input, a Unix socket: it sends `READY` with the TAP's
//! file descriptor, then `HIT` when the guest's request is there, and answers the guest once
//! the demo says `GO`, so that the demo can look at a guest that is certainly running.

use crate::process::ip;
use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

/// First argument that turns the demo's program into the peer.
const PEER_FLAG: &str = "--demo-peer";
const READY: u8 = b'R';
const HIT: u8 = b'H';
const GO: u8 = b'G';
/// The peer's address; the guest's script names it too.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const PORT: u16 = 8080;
/// Where what comes is sent back.
const ECHO_PORT: u16 = 8081;
/// How long a step of the conversation may take.
const STEP: Duration = Duration::from_secs(20);
/// Longest request that is read.
const MAX_REQUEST: u64 = 16 << 10;

/// The running peer, as the demo sees it. Dropping it ends the process and so removes the TAP's
/// namespace.
#[derive(Debug)]
pub struct Peer {
    process: Child,
    socket: UnixStream,
    /// The TAP; its namespace is the peer's.
    pub tap: OwnedFd,
}

impl Peer {
    /// Starts the peer, which will serve `page`.
    ///
    /// # Errors
    /// It cannot be started, or may not make namespaces or a TAP.
    pub fn start(page: &str) -> anyhow::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let mut process = Command::new(std::env::current_exe()?)
            .args([PEER_FLAG, page])
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .context("cannot start the process for the TAP's other side")?;
        socket.set_read_timeout(Some(STEP))?;
        match receive_tap(&socket) {
            Ok(tap) => Ok(Self { process, socket, tap }),
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                Err(error.context("cannot make a TAP in a namespace of its own"))
            }
        }
    }

    /// The process in whose namespaces the TAP is.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Lets the page go to the guest.
    pub(super) fn answer(&mut self) -> anyhow::Result<()> {
        self.socket.write_all(&[GO]).context("the peer is gone")
    }

    /// Lets the page go to the guest as soon as it asks.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn answer_at_once(&mut self) -> anyhow::Result<()> {
        self.answer()
    }

    /// A second handle that waits for the guest's request from another thread.
    pub(super) fn try_clone_socket(&self) -> std::io::Result<UnixStream> {
        self.socket.try_clone()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Becomes the peer if the command line says so, and then never returns.
pub fn intercept() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(PEER_FLAG) {
        return;
    }
    let page = arguments.next().unwrap_or_default();
    if let Err(error) = serve(&page) {
        eprintln!("demo: the TAP's other side: {error:#}");
        std::process::exit(1);
    }
    std::process::exit(0)
}

fn serve(page: &str) -> anyhow::Result<()> {
    let mut demo = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    enter_namespaces().context(images::MORE_NAMESPACES)?;
    let tap = crate::tap::open("tap0").context("/dev/net/tun")?;
    for command in [
        "link set lo up",
        "address add 10.0.2.2/24 dev tap0",
        "link set tap0 up",
    ] {
        ip(command)?;
    }
    let listener = TcpListener::bind((ADDRESS, PORT))?;
    let echoes = TcpListener::bind((ADDRESS, ECHO_PORT))?;
    thread::spawn(move || {
        for connection in echoes.incoming().flatten() {
            thread::spawn(move || echo(&connection));
        }
    });
    send_tap(&demo, tap)?;
    let (connection, _) = listener.accept()?;
    connection.set_read_timeout(Some(STEP))?;
    read_request(&connection)?;
    demo.write_all(&[HIT])?;
    let mut word = [0];
    demo.read_exact(&mut word)?;
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        page.len()
    );
    (&connection).write_all(&[head.as_bytes(), page.as_bytes()].concat())?;
    drop(connection);
    // The namespace, and so the TAP's address, must outlive the guest: wait for the demo's end.
    let _ = demo.read(&mut word);
    Ok(())
}

/// Sends everything back, to the end of what comes.
fn echo(mut connection: &TcpStream) {
    // A guest that goes away in between is its own business.
    let _ = std::io::copy(&mut &*connection, &mut connection);
    let _ = connection.shutdown(Shutdown::Write);
}

/// Reads up to the blank line that ends the request's head.
fn read_request(connection: impl Read) -> anyhow::Result<()> {
    let mut lines = BufReader::new(connection.take(MAX_REQUEST)).lines();
    match lines.next().transpose()? {
        Some(first) if first.starts_with("GET /page ") => {}
        other => bail!("the guest's request began with {other:?}"),
    }
    for line in lines {
        if line?.is_empty() {
            return Ok(());
        }
    }
    bail!("the guest's request has no end")
}

fn enter_namespaces() -> anyhow::Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    Ok(())
}

fn send_tap(demo: &UnixStream, tap: OwnedFd) -> anyhow::Result<()> {
    let fds = [tap.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        demo.as_raw_fd(),
        &[IoSlice::new(&[READY])],
        &rights,
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}

fn receive_tap(socket: &UnixStream) -> anyhow::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let fd = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.context("it ended before it had a TAP")?;
    #[expect(unsafe_code, reason = "SCM_RIGHTS hands over a raw descriptor")]
    // SAFETY: recvmsg has just installed this descriptor for us and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
