//! The one interface this process may touch: a TAP whose frames carry virtio-net headers.
//!
//! Everything that names an interface happens before lockdown. Afterwards only TUNSETOFFLOAD,
//! TUNSETQUEUE, TUNSETCARRIER and TUNSETTXFILTER remain, and all act on the fd that is already open.
#![expect(unsafe_code, reason = "TUN ioctls, and I/O between the TAP and guest memory")]

use crate::buffers::FrameBuffers;
use crate::capture::Capture;
use crate::filter::TapFilter;
use crate::header::HEADER_SIZE;
use crate::offload::TunOffload;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Longest interface name, the final zero not counted (IFNAMSIZ - 1).
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Why there is no TAP to serve.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be an interface's.
    #[error("'{0}' is no interface name: it takes 1 to {MAX_NAME} bytes, no '/' and no space")]
    Name(String),
    /// There is no such interface.
    #[error("no interface '{0}' in this network namespace; hint: ip tuntap add {0} mode tap vnet_hdr")]
    Missing(String),
    /// The TUN driver's device file did not open.
    #[error("cannot open /dev/net/tun; hint: modprobe tun, and allow this user to open it")]
    Device(#[source] io::Error),
    /// Another process has the TAP open.
    #[error("TAP '{0}' is busy: another process has it open")]
    Busy(String),
    /// The TAP belongs to someone else.
    #[error("TAP '{0}' is not permitted; hint: create it with `user` set to this user")]
    NotPermitted(String),
    /// The interface exists and is not such a TAP.
    #[error("'{0}' is not a TAP that can be opened with {1} queue(s)")]
    Kind(String, usize),
    /// The inherited fd is something else.
    #[error("fd is no TAP with IFF_VNET_HDR and IFF_NO_PI (flags {0:#x})")]
    Flags(u32),
    /// The inherited fd has no interface, and no predecessor told of what it had.
    #[error("fd is attached to no interface, or the interface was deleted")]
    Gone,
    /// An ioctl failed.
    #[error("{0} failed on the TAP")]
    Ioctl(&'static str, #[source] io::Error),
}

/// `struct ifreq` as the TUN ioctls use it: a name, and flags in a union of 24 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: c_int) -> Self {
        let mut bytes = [0; libc::IFNAMSIZ];
        let used = name.len().min(MAX_NAME);
        bytes[..used].copy_from_slice(&name.as_bytes()[..used]);
        Self {
            name: bytes,
            flags: flags as u16,
            rest: [0; 22],
        }
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(MAX_NAME);
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}

/// What frames do to a queue of a multi-queue TAP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueueState {
    /// The kernel may steer flows to this queue.
    Attached,
    /// The kernel steers nothing to this queue.
    Detached,
}

/// One queue of an open TAP.
#[derive(Debug)]
pub struct Tap {
    capture: Option<Arc<Capture>>,
    fd: OwnedFd,
    name: String,
    attached: bool,
}

/// `_IOW('T', 209, unsigned int)`, and its TUN_FLT_ALLMULTI.
const TUNSETTXFILTER: libc::Ioctl = 0x4004_54d1;
const FILTER_ALL_MULTICAST: u16 = 1;
/// `_IOW('T', 226, int)`.
const TUNSETCARRIER: libc::Ioctl = 0x4004_54e2;

const TAP_FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

impl Tap {
    /// Opens `queues` queues of the existing TAP `name` in this network namespace.
    ///
    /// # Errors
    /// A [`TapError`] that names the interface.
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>, TapError> {
        let bad = |b: u8| b == b'/' || b.is_ascii_whitespace() || b == 0;
        if name.is_empty() || name.len() > MAX_NAME || name.bytes().any(bad) {
            return Err(TapError::Name(name.to_owned()));
        }
        if nix::net::if_::if_nametoindex(name).is_err() {
            return Err(TapError::Missing(name.to_owned()));
        }
        if queues > 1 {
            return (0..queues).map(|_| Self::attach(name, true, queues)).collect();
        }
        // A TAP made for several queues refuses an opener that does not say so.
        Self::attach(name, false, 1)
            .or_else(|error| match error {
                TapError::Kind(..) => Self::attach(name, true, 1),
                other => Err(other),
            })
            .map(|tap| vec![tap])
    }

    fn attach(name: &str, multi_queue: bool, queues: usize) -> Result<Self, TapError> {
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd =
            open("/dev/net/tun", flags, Mode::empty()).map_err(|error| TapError::Device(error.into()))?;
        let more = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        let mut request = InterfaceRequest::new(name, TAP_FLAGS | more);
        ioctl_request(fd.as_fd(), libc::TUNSETIFF, &mut request).map_err(|error| match error {
            Errno::EBUSY => TapError::Busy(name.to_owned()),
            Errno::EPERM => TapError::NotPermitted(name.to_owned()),
            Errno::EINVAL | Errno::E2BIG => TapError::Kind(name.to_owned(), queues),
            other => TapError::Ioctl("TUNSETIFF", other.into()),
        })?;
        Self {
            capture: None,
            fd,
            name: name.to_owned(),
            attached: true,
        }
        .prepared()
    }

    /// Takes over an fd, after a look at what it is. Its interface may be gone: all that the fd does fails then.
    ///
    /// # Errors
    /// [`TapError::Flags`] when it is not a TAP with virtio-net headers.
    pub fn adopt(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = InterfaceRequest::new("", 0);
        match ioctl_request(fd.as_fd(), libc::TUNGETIFF, &mut request) {
            Ok(()) => {}
            Err(Errno::EBADFD) => {
                return Ok(Self {
                    capture: None,
                    fd,
                    name: "gone".to_owned(),
                    attached: true,
                });
            }
            Err(error) => return Err(TapError::Ioctl("TUNGETIFF", error.into())),
        }
        let flags = c_int::from(request.flags);
        if flags & TAP_FLAGS != TAP_FLAGS || flags & libc::IFF_TUN != 0 {
            return Err(TapError::Flags(u32::from(request.flags)));
        }
        let nonblocking = fcntl(&fd, FcntlArg::F_GETFL)
            .map(OFlag::from_bits_retain)
            .and_then(|now| fcntl(&fd, FcntlArg::F_SETFL(now | OFlag::O_NONBLOCK)));
        nonblocking.map_err(|error| TapError::Ioctl("F_SETFL", error.into()))?;
        Self {
            capture: None,
            fd,
            name: request.name(),
            // A predecessor may have detached it.
            attached: flags & libc::IFF_DETACH_QUEUE == 0,
        }
        .prepared()
    }

    /// A datagram socket in a TAP's place, whose every ioctl fails.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn from_socket(fd: OwnedFd) -> Self {
        Self {
            fd,
            name: "fuzz".to_owned(),
            capture: None,
            attached: true,
        }
    }

    /// Header size and byte order as virtio 1.x has them, and no offload and no filter until a driver
    /// asks: all of it belongs to the interface, which may have served another process.
    fn prepared(self) -> Result<Self, TapError> {
        ioctl_int(self.fd.as_fd(), libc::TUNSETVNETHDRSZ, HEADER_SIZE as c_int)
            .map_err(|error| TapError::Ioctl("TUNSETVNETHDRSZ", error.into()))?;
        ioctl_int(self.fd.as_fd(), libc::TUNSETVNETLE, 1)
            .map_err(|error| TapError::Ioctl("TUNSETVNETLE", error.into()))?;
        self.set_offload(TunOffload::default())
            .map_err(|error| TapError::Ioctl("TUNSETOFFLOAD", error))?;
        self.set_filter(&TapFilter::Everything)
            .map_err(|error| TapError::Ioctl("TUNSETTXFILTER", error))?;
        Ok(self)
    }

    /// The kernel can segment UDP on TAPs (6.2 and later); `None` where the interface is gone. Leaves all
    /// offloads off.
    #[must_use]
    pub fn supports_uso(&self) -> Option<bool> {
        let known = self.set_offload(TunOffload::TCP.with(TunOffload::USO));
        match known.and_then(|()| self.set_offload(TunOffload::default())) {
            Ok(()) => Some(true),
            Err(error) if is_gone(&error) => None,
            Err(_) => Some(false),
        }
    }

    /// Tells the kernel what the driver takes unfinished. Applies to the whole interface.
    ///
    /// # Errors
    /// EINVAL for a set that this kernel does not know.
    pub fn set_offload(&self, offload: TunOffload) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
        let result = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload.bits()),
            )
        };
        Errno::result(result).map(drop).map_err(Into::into)
    }

    /// Adds this queue to, or takes it out of, the kernel's steering.
    ///
    /// # Errors
    /// EINVAL where the queue is in that state already, or the TAP has one queue only.
    pub fn set_queue(&self, state: QueueState) -> io::Result<()> {
        let flags = match state {
            QueueState::Attached => libc::IFF_ATTACH_QUEUE,
            QueueState::Detached => libc::IFF_DETACH_QUEUE,
        };
        let mut request = InterfaceRequest::new("", flags);
        ioctl_request(self.fd.as_fd(), libc::TUNSETQUEUE, &mut request).map_err(Into::into)
    }

    /// What of the host's frames reaches the queues. Applies to the whole interface.
    ///
    /// # Errors
    /// EBADFD when the interface is gone.
    pub fn set_filter(&self, filter: &TapFilter) -> io::Result<()> {
        // struct tun_filter: flags, count, addresses.
        let (flags, addresses): (u16, &[_]) = match filter {
            TapFilter::Everything => (0, &[]),
            TapFilter::These {
                addresses,
                all_multicast,
            } => (if *all_multicast { FILTER_ALL_MULTICAST } else { 0 }, addresses),
        };
        let mut bytes = Vec::with_capacity(4 + addresses.len() * 6);
        bytes.extend(flags.to_ne_bytes());
        bytes.extend((addresses.len() as u16).to_ne_bytes());
        bytes.extend(addresses.iter().flat_map(|address| address.0));
        // SAFETY: the kernel reads the header and as many addresses as it counts, all in `bytes`.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETTXFILTER, bytes.as_ptr()) };
        Errno::result(result).map(drop).map_err(Into::into)
    }

    /// Whether the host's side of the link sees a carrier.
    ///
    /// # Errors
    /// EBADFD when the interface is gone; EINVAL before Linux 4.21.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        Ok(ioctl_int(self.fd.as_fd(), TUNSETCARRIER, on.into())?)
    }

    /// The kernel steered to this queue when it was opened or taken over.
    #[must_use]
    pub fn was_attached(&self) -> bool {
        self.attached
    }

    /// Copies what crosses from now on to `capture`.
    pub fn set_capture(&mut self, capture: Option<Arc<Capture>>) {
        self.capture = capture;
    }

    /// The interface's name at the time it was opened.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads one frame with its header straight into `buffers`; the length counts the header.
    /// A frame that is longer fills the buffers and loses its end.
    ///
    /// # Errors
    /// EAGAIN when no frame waits; EBADFD when the interface is gone.
    pub fn read_frame(&self, buffers: &FrameBuffers<'_>) -> io::Result<usize> {
        let iovecs = buffers.iovecs();
        // SAFETY: each iovec covers memory that `buffers` borrows and that may change at any
        // time: guest memory, or a private buffer borrowed exclusively.
        let read = unsafe { libc::readv(self.fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) };
        let length = Errno::result(read)? as usize;
        if let Some(capture) = &self.capture {
            capture.record(buffers, length);
        }
        Ok(length)
    }

    /// Writes one frame with its header straight from `buffers`.
    ///
    /// # Errors
    /// EAGAIN when the kernel's queue is full; EINVAL for a frame that it refuses; EIO while
    /// the interface is down; EBADFD when it is gone.
    pub fn write_frame(&self, buffers: &FrameBuffers<'_>) -> io::Result<()> {
        let iovecs = buffers.iovecs();
        // SAFETY: each iovec covers memory that `buffers` borrows; the kernel only reads it.
        let written = unsafe { libc::writev(self.fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as c_int) };
        Errno::result(written)?;
        if let Some(capture) = &self.capture {
            capture.record(buffers, buffers.length());
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether an ioctl met no interface.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EBADFD as i32)
}

fn ioctl_request(
    fd: BorrowedFd<'_>,
    number: libc::Ioctl,
    request: &mut InterfaceRequest,
) -> Result<(), Errno> {
    // SAFETY: all requests passed here read and write one `struct ifreq`, whose layout and size
    // (40 bytes) InterfaceRequest has.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) };
    Errno::result(result).map(drop)
}

fn ioctl_int(fd: BorrowedFd<'_>, number: libc::Ioctl, value: c_int) -> Result<(), Errno> {
    // SAFETY: all requests passed here read one int behind the pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_ref(&value)) };
    Errno::result(result).map(drop)
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);
