//! Messages between spawner, supervisor and vmm.
//!
//! Transport: a Unix `SOCK_SEQPACKET` socketpair; one datagram is one [`Envelope`] in postcard
//! encoding, at most [`MAX_MESSAGE`] bytes, with at most [`MAX_FDS`] file descriptors attached
//! (SCM_RIGHTS) where the body says so. The first message of each side carries the version; a
//! peer of another version is refused. End of file means that the peer is gone: the receiver
//! winds down.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of this protocol; both ends come from one build.
pub const PROTOCOL_VERSION: u16 = 1;
/// Longest message in bytes. A longer one is refused unread.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Most file descriptors in one message: a disk that is attached has one for each layer of its image,
/// [`MAX_CHAIN`](crate::image::MAX_CHAIN) at most, and a dozen besides. The kernel passes 253.
pub const MAX_FDS: usize = 40;
/// File descriptors that come with a back end: those of [`DeviceConfig::socket`], [`DeviceConfig::requests`] and
/// [`DeviceConfig::requests_peer`], in this order, made for it alone.
pub const BACKEND_FDS: usize = 3;

/// A message with its version and number. A reply carries the number of what it answers;
/// events that answer nothing carry 0.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// Request number, 1 and up; 0 for events.
    pub id: u64,
    /// The message.
    pub body: T,
}

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// With more descriptors than [`MAX_FDS`].
    #[error("message with {0} descriptors, more than {MAX_FDS}")]
    TooManyFds(usize),
    /// Of another version.
    #[error("peer speaks version {0} of the control protocol, this is {PROTOCOL_VERSION}")]
    Version(u16),
    /// Not an encoding of the expected type.
    #[error("malformed control message")]
    Malformed(#[source] postcard::Error),
}

impl<T: Serialize + DeserializeOwned> Envelope<T> {
    /// A message of the current version.
    pub fn new(id: u64, body: T) -> Self {
        Self {
            version: PROTOCOL_VERSION,
            id,
            body,
        }
    }

    /// The bytes of one datagram.
    ///
    /// # Errors
    /// [`WireError::TooLong`] when the encoding exceeds [`MAX_MESSAGE`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let bytes = postcard::to_allocvec(self).map_err(WireError::Malformed)?;
        if bytes.len() > MAX_MESSAGE {
            Err(WireError::TooLong(bytes.len()))
        } else {
            Ok(bytes)
        }
    }

    /// Reads one datagram. The version is judged before the body is looked at.
    ///
    /// # Errors
    /// Any [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > MAX_MESSAGE {
            return Err(WireError::TooLong(bytes.len()));
        }
        let (version, _) = postcard::take_from_bytes::<u16>(bytes).map_err(WireError::Malformed)?;
        if version != PROTOCOL_VERSION {
            return Err(WireError::Version(version));
        }
        postcard::from_bytes(bytes).map_err(WireError::Malformed)
    }
}

/// A file descriptor number in the receiving process, inherited at exec.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FdNumber(pub i32);

impl FdNumber {
    /// None was inherited: it came, or comes, with a message.
    pub const NONE: Self = Self(-1);
}

/// Everything the vmm needs, sent once as the first message on its control socket.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmConfig {
    /// The guest-visible machine ([`crate::machine::MACHINE_VERSION`]).
    pub machine_version: u16,
    /// vCPUs, 1 to [`crate::machine::MAX_CPUS`].
    pub cpus: u8,
    /// Guest RAM in bytes, a multiple of 4096 (of the huge page size where given).
    pub memory: u64,
    /// Huge page size in bytes: 2 MiB or 1 GiB.
    pub huge_page_size: Option<u64>,
    /// `/dev/kvm`, opened by the launcher; closed by the vmm before lockdown.
    pub kvm: FdNumber,
    /// The kernel image: ELF or bzImage.
    pub kernel: FdNumber,
    /// The initial RAM disk.
    pub initrd: Option<FdNumber>,
    /// Kernel command line as the person gave it; the vmm appends nothing.
    pub cmdline: String,
    /// The console: a stream socket, non-blocking; bytes both ways.
    pub console: FdNumber,
    /// Devices, each with a slot of its own.
    pub devices: Vec<DeviceConfig>,
    /// PCI device numbers of slots for devices that come later. With any, all devices can be taken out again.
    pub spares: Vec<u8>,
    /// A guest's reboot restarts the machine (or ends the VM).
    pub restart_on_reboot: bool,
    /// The guest runs one command, whose exit status it writes to [`crate::machine::STATUS_REGISTER`].
    pub takes_status: bool,
}

/// One vhost-user device as the vmm sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// Name in messages, at most 64 bytes.
    pub id: String,
    /// PCI device number.
    pub slot: u8,
    /// Virtio device id (virtio 1.3, 5): 1 net, 2 block, and so on.
    pub device_type: u16,
    /// Its first back end's connected vhost-user stream socket.
    pub socket: FdNumber,
    /// The channel for that back end's own requests (SET_BACKEND_REQ_FD), a stream socketpair: the
    /// vmm's end,
    pub requests: FdNumber,
    /// and the end that the back end is given. Its successors have channels of their own.
    pub requests_peer: FdNumber,
    /// Queues, where the type does not say: of a block device at most as many as its back end has, of others instead
    /// of what the back end says.
    pub num_queues: Option<u16>,
    /// The largest that a queue may be, in entries; default the type's.
    pub queue_size: Option<u16>,
    /// Configuration space for back ends that offer none; overlaid on what a network back end
    /// gives (MAC, MTU; status where it has none).
    pub config: Vec<u8>,
    /// Feature bits that come with `config` (VIRTIO_NET_F_MAC and the like).
    pub config_features: u64,
    /// The back end is one of ours in a jail (false: it belongs to someone else).
    pub ours: bool,
    /// Its owner says that it completes requests in the order in which they were made available.
    pub in_order: bool,
}

/// From the supervisor (or, for the first message, the spawner) to the vmm.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ToVmm {
    /// The first message: build the machine and start it.
    Start(Box<VmConfig>),
    /// Press the ACPI power button. Answered by [`FromVmm::Done`].
    PowerButton,
    /// End the VM now: stop vCPUs, drain devices, report [`FromVmm::Ended`].
    Stop,
    /// A new back end for the device in this slot, [`BACKEND_FDS`] attached. The sender has made sure that a dead
    /// predecessor no longer writes. Answered by [`FromVmm::Done`] once the guest is served again, or by
    /// [`FromVmm::Failed`]: another one may then be tried. May come before [`FromVmm::Running`]: a back end that is lost while the
    /// machine is built is replaced too.
    ReplaceBackend {
        /// PCI device number.
        slot: u8,
        /// Which back end of this device it is: the first is 0, each further one more.
        generation: u32,
    },
    /// Drain the device in this slot and let go of its back end, for another to take over. Answered
    /// by [`FromVmm::Done`] once nothing is in flight, or by [`FromVmm::Failed`].
    ReleaseBackend {
        /// PCI device number.
        slot: u8,
    },
    /// No back end will come any more for the device in this slot: tell the guest (NEEDS_RESET).
    /// Answered by [`FromVmm::Done`].
    GiveUpBackend {
        /// PCI device number.
        slot: u8,
        /// Why, one line.
        reason: String,
    },
    /// Put a device into an empty slot, and tell the guest; [`BACKEND_FDS`] attached, of its back end of
    /// generation 0. The numbers in the configuration mean nothing. Answered by [`FromVmm::Done`] once the
    /// guest can see it, or by [`FromVmm::Failed`].
    Attach(Box<DeviceConfig>),
    /// Ask the guest to let go of the device in this slot. Answered by [`FromVmm::Done`] once it is asked, or by
    /// [`FromVmm::Failed`]; [`FromVmm::Detached`] may follow at any time.
    Detach {
        /// PCI device number.
        slot: u8,
    },
    /// Ask for [`FromVmm::Stats`].
    Stats,
}

/// From the vmm to the supervisor.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromVmm {
    /// The machine is built and locked down; the first vCPU enters the guest next. Times are
    /// CLOCK_MONOTONIC nanoseconds.
    Running {
        /// When the process started to build the machine.
        started_ns: u64,
        /// Just before the first KVM_RUN.
        first_instruction_ns: u64,
    },
    /// The request with this envelope's number was carried out.
    Done,
    /// The request with this envelope's number failed.
    Failed(String),
    /// A back end closed its socket, broke the protocol or did not answer: it is no longer used.
    /// The guest has not been told and waits for [`ToVmm::ReplaceBackend`].
    BackendLost {
        /// The device's id.
        device: String,
        /// Which of its back ends ([`ToVmm::ReplaceBackend`]).
        generation: u32,
        /// In which way.
        loss: Loss,
        /// Requests that the guest had made available and not seen completed.
        outstanding: u32,
        /// What happened, one line.
        reason: String,
    },
    /// A device is lost to the guest until it is reset (NEEDS_RESET).
    DeviceFault {
        /// The device's id.
        device: String,
        /// What happened, one line.
        reason: String,
    },
    /// The guest let go of the device in this slot, which is empty: nothing is in flight, and its back end is
    /// no longer used.
    Detached {
        /// PCI device number.
        slot: u8,
    },
    /// The guest rebooted and the machine started again.
    Rebooted,
    /// The VM could not be built, its device could not be connected, or it cannot go on; the vmm exits next.
    Error {
        /// What failed, one line.
        what: String,
        /// Why.
        cause: String,
        /// What to do about it; may be empty.
        hint: String,
    },
    /// The VM is over; the vmm exits next.
    Ended(EndReason),
    /// Counters.
    Stats(VmStats),
}

/// How a back end was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Loss {
    /// Its socket was closed: most often its process has ended.
    Closed,
    /// It did not answer in time.
    Silent,
    /// It broke the protocol.
    Broken,
}

/// How a guest ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum EndReason {
    /// ACPI S5.
    PowerOff,
    /// The guest's command ended with this status.
    Exited(u8),
    /// ACPI S5, where a command's status was to come first.
    NoStatus,
    /// Reset, where the spec says that a reset ends the VM.
    Reset,
    /// Reset, reboot or triple fault before the guest wrote to its console or drove a device.
    InstantReset,
    /// The guest reported a kernel panic (pvpanic).
    Panic,
    /// A vCPU shut down (triple fault).
    TripleFault,
    /// KVM could not go on (internal error, failed entry).
    KvmError,
    /// Asked to stop.
    Stopped,
}

/// Counters of a running VM.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct VmStats {
    /// vCPU exits to user space by reason name (`io`, `mmio`, `hlt` and so on).
    pub exits: Vec<(String, u64)>,
    /// Bytes of console output dropped because nobody read them.
    pub console_dropped: u64,
    /// How often a queue of a device that is there was kicked again, as its requests waited for a second or longer and
    /// none was completed: the host is slow, or a kick was lost.
    pub rekicks: u64,
}

/// Exit codes of `bulkhead run`.
pub mod exit_code {
    /// The guest powered off.
    pub const POWER_OFF: u8 = 0;
    /// Something failed; the message says what.
    pub const ERROR: u8 = 1;
    /// The command line or the spec is wrong.
    pub const USAGE: u8 = 2;
    /// The guest's kernel panicked.
    pub const PANIC: u8 = 3;
    /// A vCPU shut down.
    pub const TRIPLE_FAULT: u8 = 4;
    /// The guest reset and `on-reboot` is `exit`.
    pub const RESET: u8 = 5;
    /// The guest reset before it did anything.
    pub const INSTANT_RESET: u8 = 6;
    /// A device's process was lost while the guest ran.
    pub const BACKEND_LOST: u8 = 7;
    /// A deadline passed.
    pub const TIMEOUT: u8 = 8;
    /// A process made a system call that its filter forbids.
    pub const SECCOMP: u8 = 148;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_wire() {
        let message = Envelope::new(7, FromVmm::Ended(EndReason::Panic));
        let bytes = message.encode().unwrap();
        assert_eq!(Envelope::<FromVmm>::decode(&bytes).unwrap(), message);
    }

    #[test]
    fn another_version_is_refused_before_its_body_is_read() {
        let mut bytes = Envelope::new(1, ToVmm::PowerButton).encode().unwrap();
        bytes[0] = 9;
        bytes.truncate(1);
        assert!(matches!(
            Envelope::<ToVmm>::decode(&bytes),
            Err(WireError::Version(9))
        ));
    }

    #[test]
    fn long_and_malformed_messages_are_refused() {
        assert!(matches!(
            Envelope::<ToVmm>::decode(&vec![0; MAX_MESSAGE + 1]),
            Err(WireError::TooLong(_))
        ));
        assert!(matches!(
            Envelope::<ToVmm>::decode(&[1, 1, 200]),
            Err(WireError::Malformed(_))
        ));
    }
}
