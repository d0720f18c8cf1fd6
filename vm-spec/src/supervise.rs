//! Messages between the spawner and the supervisor; transport and envelope as in
//! [`crate::control`].

use crate::control::FdNumber;
use crate::events::VmEvent;
use crate::run_state::{FdState, MadeFds, ProcessRole};
use crate::spec::OnDeviceDeath;
use serde::{Deserialize, Serialize};

/// Places for a VM's processes: fewer than it has ids.
pub const MOST_PROCESSES: usize = 60;

/// Everything the supervisor needs, sent once as the first message on its control socket.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SupervisorConfig {
    /// The VM's name.
    pub name: String,
    /// Control socket to the vmm.
    pub vmm: FdNumber,
    /// Where clients connect ([`crate::client`]): listening, non-blocking.
    pub clients: FdNumber,
    /// The console: stream socket to the vmm.
    pub console: FdNumber,
    /// Where console input comes from; absent: nowhere.
    pub input: Option<FdNumber>,
    /// Where console output goes; absent: it is read and dropped.
    pub output: Option<FdNumber>,
    /// Input is a terminal in raw mode: Ctrl-A x ends the VM.
    pub escape: bool,
    /// The jailed processes other than the supervisor. [`ToSupervisor::Exited`] counts them from 0.
    pub processes: Vec<SupervisedProcess>,
    /// The devices that someone else's back ends serve. [`ToConnector::Connect`] counts them from 0;
    /// behind them it counts NICs on a TAP of the host's, or behind a relay to passt.
    pub remotes: Vec<RemoteDevice>,
    /// PCI device numbers that are kept for devices which are attached later.
    pub spares: Vec<u8>,
    /// Socket to the connector; absent where there are no such devices.
    pub connector: Option<FdNumber>,
    /// Seconds that a guest has to power off once asked.
    pub power_off_grace: u32,
    /// Log lines are JSON objects.
    pub log_json: bool,
    /// What the end of a device's process does.
    pub on_device_death: OnDeviceDeath,
}

/// A process as the supervisor sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SupervisedProcess {
    /// `vmm` or the device's id.
    pub name: String,
    /// What it does.
    pub role: ProcessRole,
    /// What of the spec it serves, for messages: `disk[0].path: web.qcow2`.
    pub serves: Option<String>,
    /// Its process id outside its namespace, for messages.
    pub pid: i32,
    /// Read end of the pipe that is its standard output and standard error, and those of its
    /// successors.
    pub log: FdNumber,
    /// PCI device number of the device that it serves.
    pub slot: Option<u8>,
    /// Its place in what [`ToConnector::Connect`] counts, where its TAP can be opened again, or its passt started.
    pub tap: Option<u16>,
    /// Stream socket to whoever is the process, for orders; absent where it takes none.
    pub orders: Option<FdNumber>,
}

/// A device that someone else's back end serves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RemoteDevice {
    /// The device's id.
    pub name: String,
    /// PCI device number.
    pub slot: u8,
}

/// From the supervisor to the connector, the process that can reach someone else's back ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToConnector {
    /// Connect to the back end of a device, open its TAP, or start another passt for its relay, however long that
    /// takes. A second request for the same device before it is connected is as one.
    Connect {
        /// Its place.
        device: u16,
    },
}

/// From the connector to the supervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromConnector {
    /// Answers [`ToConnector::Connect`]. [`crate::control::BACKEND_FDS`] are attached, or a TAP's queues are;
    /// nothing is where a relay has another passt.
    Connected {
        /// Its place.
        device: u16,
    },
    /// Between a NIC and passt there is a relay, and its passt is gone.
    Lost {
        /// Its place.
        device: u16,
    },
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
    /// The kernel killed it, since the VM's memory limit was reached.
    OutOfMemory,
}

/// From the spawner to the supervisor.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ToSupervisor {
    /// The first message.
    Start(Box<SupervisorConfig>),
    /// A process ended and was reaped.
    Exited {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
        /// How.
        status: ExitStatus,
    },
    /// A process was stopped (SIGSTOP and its like), or goes on after that.
    Stopped {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
        /// False: it goes on.
        stopped: bool,
    },
    /// Answers [`FromSupervisor::Respawn`]: a new process builds its jail. [`crate::control::BACKEND_FDS`] are
    /// attached, for the vmm.
    Respawned {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
        /// Its process id outside its namespace, for messages.
        pid: i32,
    },
    /// Answers [`FromSupervisor::Respawn`]: there is no new process.
    NotRespawned {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
        /// Why, one line.
        why: String,
    },
    /// Answers [`FromSupervisor::Remove`]: nothing of it is kept, and nobody locks its image.
    Removed {
        /// Its place in [`SupervisorConfig::processes`], or behind them.
        process: u16,
    },
    /// The person (Ctrl-C) or the system (SIGTERM) asks for the guest to power off.
    PowerOff,
    /// Answers [`FromSupervisor::Kill`]: the signal is sent, unless the process was reaped before.
    Killed {
        /// Its place in [`SupervisorConfig::processes`], or behind them.
        process: u16,
    },
}

/// A device's process that is added to a running VM, as the command that its owner runs has planned it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddedProcess {
    /// The device's id.
    pub name: String,
    /// Disk or NIC.
    pub role: ProcessRole,
    /// Its flags, but for those that all of a VM's processes have.
    pub arguments: Vec<String>,
    /// The descriptors that it is executed with, numbered from 0.
    pub fds: Vec<FdState>,
    /// Which of them is its end of its vhost-user socket, which is made anew for each process.
    pub socket: FdNumber,
    /// What else it holds while the guest runs.
    pub made: Vec<MadeFds>,
    /// How many more descriptors come along, of files that it writes.
    pub watches: u8,
}

impl AddedProcess {
    /// Descriptors in [`FromSupervisor::Add`]: its binary, those of the files that it writes, and those that it is
    /// executed with, but for the socket.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        usize::from(self.watches) + self.fds.len()
    }
}

/// Which binary a process is made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Build {
    /// What served last.
    Current,
    /// What came with [`FromSupervisor::Candidate`].
    Candidate,
}

/// From the supervisor to the spawner.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromSupervisor {
    /// The guest runs; times as in [`crate::control::FromVmm::Running`].
    Running {
        /// When the vmm started to build the machine.
        started_ns: u64,
        /// Just before the first KVM_RUN.
        first_instruction_ns: u64,
    },
    /// Start a device's process again, in a fresh jail, with the same image or TAP. Refused while
    /// its predecessor is not reaped: an image is never open in two of them.
    Respawn {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
        /// From which binary.
        build: Build,
    },
    /// Keep another build of a device's process; one fd attached: the binary.
    Candidate {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
    },
    /// The candidate serves: from now on it is the current build.
    Adopt {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
    },
    /// Keep what it takes to make one more device process, [`AddedProcess::descriptors`] attached. A
    /// [`FromSupervisor::Respawn`] starts it.
    Add {
        /// Its place: behind all others, or that of one that was removed.
        process: u16,
        /// What it is.
        plan: Box<AddedProcess>,
    },
    /// Let go of all that is kept for a device's process, which has been reaped.
    Remove {
        /// Its place.
        process: u16,
        /// The device's id.
        name: String,
    },
    /// Keep another TAP for a NIC's process, in the place of one that is gone; its queues are attached.
    Tap {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
    },
    /// Kill one process. [`ToSupervisor::Killed`] follows, and [`ToSupervisor::Exited`], unless that has already been
    /// sent.
    Kill {
        /// Its place in [`SupervisorConfig::processes`].
        process: u16,
    },
    /// Write this down in the run-time folder.
    Event(VmEvent),
    /// Kill every process but the supervisor: a deadline passed.
    KillAll,
    /// The VM is over and its logs are written; the supervisor exits next.
    Finished {
        /// Exit code of `bulkhead run` ([`crate::control::exit_code`]).
        code: u8,
    },
}
