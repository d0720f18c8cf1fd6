//! A `bulkhead-vmm` process, driven over its control socket.

#![expect(unsafe_code, reason = "sets another process's limit")]

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, send, sendmsg, setsockopt, socketpair,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vm_spec::control::{DeviceConfig, EndReason, Envelope, FdNumber, FromVmm, MAX_MESSAGE, ToVmm, VmConfig};
use vm_spec::machine;

const DEADLINE: Duration = Duration::from_secs(20);
/// Descriptors are inheritable for a moment: one spawn at a time.
static SPAWN: Mutex<()> = Mutex::new(());

/// Where the disk is.
pub(crate) const SLOT: u8 = 1;

/// What to boot.
pub(crate) struct Guest {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
    pub(crate) cmdline: String,
    pub(crate) memory: u64,
    pub(crate) cpus: u8,
    pub(crate) restart_on_reboot: bool,
    /// There is a command, whose exit status is awaited.
    pub(crate) takes_status: bool,
    /// The back end of a block device in slot [`SLOT`].
    pub(crate) disk: Option<UnixStream>,
    /// Such a device may come later.
    pub(crate) spare: bool,
}

impl Guest {
    /// The smallest machine for `kernel`.
    pub(crate) fn new(kernel: &[u8]) -> Self {
        Self {
            kernel: super::guest::file(kernel),
            initrd: None,
            cmdline: String::new(),
            memory: machine::MIN_MEMORY,
            cpus: 1,
            restart_on_reboot: true,
            takes_status: false,
            disk: None,
            spare: false,
        }
    }
}

/// The process and our ends of its sockets.
pub(crate) struct Vmm {
    child: Child,
    control: OwnedFd,
    pub(crate) console: UnixStream,
    next_id: u64,
}

impl Vmm {
    pub(crate) fn start(guest: Guest) -> Self {
        let (control, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let timeout = TimeVal::milliseconds(DEADLINE.as_millis() as i64);
        setsockopt(&control, sockopt::ReceiveTimeout, &timeout).unwrap();
        let (console, their_console) = UnixStream::pair().unwrap();
        console.set_read_timeout(Some(DEADLINE)).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let mut inherited: Vec<OwnedFd> = vec![theirs, kvm.into(), guest.kernel.into(), their_console.into()];
        inherited.extend(guest.initrd.map(OwnedFd::from));
        let has_initrd = inherited.len() > 4;
        let first_of_disk = inherited.len();
        if let Some(disk) = guest.disk {
            let (requests, peer) = UnixStream::pair().unwrap();
            inherited.extend([disk, requests, peer].map(OwnedFd::from));
        }
        let has_disk = inherited.len() > first_of_disk;
        let number = |index: usize| FdNumber(inherited[index].as_raw_fd());
        let config = VmConfig {
            machine_version: machine::MACHINE_VERSION,
            cpus: guest.cpus,
            memory: guest.memory,
            huge_page_size: None,
            kvm: number(1),
            kernel: number(2),
            initrd: has_initrd.then(|| number(4)),
            cmdline: guest.cmdline,
            console: number(3),
            devices: has_disk
                .then(|| disk([0, 1, 2].map(|i| number(first_of_disk + i))))
                .into_iter()
                .collect(),
            spares: guest.spare.then_some(SLOT).into_iter().collect(),
            restart_on_reboot: guest.restart_on_reboot,
            takes_status: guest.takes_status,
        };
        let first = Envelope::new(1, ToVmm::Start(Box::new(config))).encode().unwrap();
        send(control.as_raw_fd(), &first, MsgFlags::empty()).unwrap();
        let mut command = Command::new(binary());
        command
            .arg(format!("--control-fd={}", inherited[0].as_raw_fd()))
            .arg(format!("--seccomp={}", seccomp()))
            .arg("--log-level=warn")
            .stdin(Stdio::null())
            .env_clear();
        let guard = SPAWN.lock().unwrap();
        for fd in &inherited {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        let child = command.spawn().unwrap();
        drop(inherited);
        drop(guard);
        Self {
            child,
            control,
            console,
            next_id: 2,
        }
    }

    pub(crate) fn ask(&mut self, body: ToVmm) -> FromVmm {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = Envelope::new(id, body).encode().unwrap();
        send(self.control.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
        loop {
            let message = self.receive();
            if message.id == id {
                return message.body;
            }
        }
    }

    /// Hands the disk another back end. The number by which it is answered.
    pub(crate) fn replace_disk(&mut self, socket: &UnixStream) -> u64 {
        self.send_with(
            ToVmm::ReplaceBackend {
                slot: SLOT,
                generation: 1,
            },
            socket,
        )
    }

    /// Puts a disk into the slot that is kept for one.
    pub(crate) fn attach_disk(&mut self, socket: &UnixStream) -> FromVmm {
        let config = disk([FdNumber(-1); 3]);
        let id = self.send_with(ToVmm::Attach(Box::new(config)), socket);
        let answer = self.receive();
        assert_eq!(answer.id, id, "{answer:?}");
        answer.body
    }

    /// Lets it have no descriptor of this number or above.
    pub(crate) fn limit_descriptors(&self, most: u64) {
        let limit = libc::rlimit {
            rlim_cur: most,
            rlim_max: 704,
        };
        let pid = self.child.id() as libc::pid_t;
        // SAFETY: reads the limit, and writes nothing.
        let done = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    fn send_with(&mut self, body: ToVmm, socket: &UnixStream) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = Envelope::new(id, body).encode().unwrap();
        let (requests, peer) = UnixStream::pair().unwrap();
        let fds = [socket, &requests, &peer].map(AsRawFd::as_raw_fd);
        let rights = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(&bytes)];
        sendmsg::<()>(self.control.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        id
    }

    pub(crate) fn tell(&self, body: ToVmm) {
        let bytes = Envelope::new(0, body).encode().unwrap();
        send(self.control.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    pub(crate) fn event(&self) -> FromVmm {
        self.receive().body
    }

    pub(crate) fn running(&self) {
        match self.event() {
            FromVmm::Running {
                started_ns,
                first_instruction_ns,
            } => assert!(started_ns < first_instruction_ns),
            other => panic!("not running: {other:?}"),
        }
    }

    /// The reason after any number of reboots, which are counted.
    pub(crate) fn ended(&self) -> (EndReason, usize) {
        let mut reboots = 0;
        loop {
            match self.event() {
                FromVmm::Ended(reason) => return (reason, reboots),
                FromVmm::Rebooted => reboots += 1,
                other => panic!("neither end nor reboot: {other:?}"),
            }
        }
    }

    pub(crate) fn receive(&self) -> Envelope<FromVmm> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let length =
            recv(self.control.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("a message in time");
        assert!(length > 0, "the vmm is gone");
        Envelope::decode(&buffer[..length]).unwrap()
    }

    pub(crate) fn output(&mut self) -> String {
        let mut text = Vec::new();
        self.console.read_to_end(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    /// Processor time of the thread of this name, in ticks of 10 ms.
    pub(crate) fn ticks(&self, name: &str) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let stat = tasks
            .map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap())
            .find(|stat| stat.contains(&format!("({name})")))
            .unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let times = fields.split_whitespace().skip(11).take(2);
        times.map(|time| time.parse::<u64>().unwrap()).sum()
    }

    /// How often the main thread waited for something.
    pub(crate) fn sleeps(&self) -> u64 {
        let id = self.child.id();
        let status = std::fs::read_to_string(format!("/proc/{id}/task/{id}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    }

    /// Closes the control socket: the supervisor is gone.
    pub(crate) fn abandon(self) -> ExitStatus {
        let Self { child, control, .. } = self;
        drop(control);
        wait(child)
    }

    pub(crate) fn exit(self) -> ExitStatus {
        wait(self.child)
    }
}

fn disk([socket, requests, requests_peer]: [FdNumber; 3]) -> DeviceConfig {
    DeviceConfig {
        id: "disk0".into(),
        slot: SLOT,
        device_type: 2,
        socket,
        requests,
        requests_peer,
        num_queues: Some(1),
        queue_size: None,
        config: vec![0; 60],
        config_features: 0,
        ours: true,
        in_order: false,
    }
}

fn wait(mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the vmm does not exit");
        }
        // A child's exit has no event here that std offers with a deadline.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Where the binaries under test are, if not built for this test.
const BIN_DIR: &str = "BULKHEAD_BIN_DIR";

fn binary() -> PathBuf {
    match std::env::var_os(BIN_DIR) {
        Some(folder) => PathBuf::from(folder).join("bulkhead-vmm"),
        None => env!("CARGO_BIN_EXE_bulkhead-vmm").into(),
    }
}

/// The policies fit the static musl binaries; another libc makes other calls.
fn seccomp() -> &'static str {
    let shipped = std::env::var_os(BIN_DIR).is_some() || cfg!(target_env = "musl");
    if shipped { "enforce" } else { "off" }
}
