//! Opening what the spec names. Everything is opened here, once, by the launcher; jailed
//! processes get descriptors.

use super::Options;
use super::chain::{Layer, Purpose, open_chain, open_image};
use super::connect::connect_within;
use super::disk::{Disk, Key};
use super::kernel::{self, Kernel};
use super::kvm;
use super::machine::{Backend, Device, Remote};
use super::net::line::Lines;
use super::net::{self, Nic};
use super::plan::Source;
use super::run_dir::RunDir;
use super::signals::interruptibly;
use super::spawn::tap_sources;
use super::watch::Watch;
use crate::failure::Failure;
use crate::sandbox::cgroup::disk_behind;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{SockType, UnixAddr};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use vm_spec::control::FdNumber;
use vm_spec::spec::{BootSpec, ImageFormat, VmSpec};

/// Most bytes of a passphrase that are copied: more than any disk process takes.
const LONGEST_KEY: u64 = 4096;

/// How long someone else's back end may take to accept us.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(10);
/// How long one that was started a moment ago may take to listen,
const LISTEN_DEADLINE: Duration = Duration::from_secs(2);
/// and how often it is tried.
const LISTEN_LOOK: Duration = Duration::from_millis(10);

/// The files of a VM.
pub(crate) struct Inputs {
    /// `/dev/null`.
    pub(crate) null: OwnedFd,
    pub(crate) kvm: OwnedFd,
    pub(crate) kernel: OwnedFd,
    pub(crate) initrd: Option<OwnedFd>,
    /// One for each device, in order.
    pub(crate) backends: Vec<BackendInput>,
    /// The holders of TAPs that were waited for.
    settled: Vec<net::Holder>,
}

/// What a device's back end works on.
pub(crate) enum BackendInput {
    Images(Images),
    Net {
        tap: net::Opened,
        pcap: Option<OwnedFd>,
        /// Where orders for its link come from; made once there is a run-time folder.
        link: Option<OwnedFd>,
        /// What its process leaves for a successor.
        state: OwnedFd,
    },
    /// Connected to someone else's back end.
    Socket(OwnedFd),
}

/// What of a [`BackendInput`] is no descriptor of the plan's.
pub(super) struct Given {
    /// Who makes its TAP.
    pub(super) making: Option<net::Holder>,
    /// What watches the files that it writes.
    pub(super) watches: Vec<Watch>,
}

impl BackendInput {
    /// Puts its descriptors into `table` as those of device `n`.
    pub(super) fn give(self, n: usize, table: &mut BTreeMap<Source, OwnedFd>) -> Given {
        let (mut making, mut watches) = (None, Vec::new());
        match self {
            Self::Socket(socket) => drop(table.insert(Source::FrontEnd(n), socket)),
            Self::Net {
                tap,
                pcap,
                link,
                state,
            } => {
                table.insert(Source::NicState(n), state);
                table.extend(link.map(|fd| (Source::Link(n), fd)));
                table.extend(pcap.map(|file| (Source::Pcap(n), file)));
                match tap {
                    net::Opened::Ready(taps) => table.extend(tap_sources(n, taps)),
                    net::Opened::Making(holder) => making = Some(holder),
                }
            }
            Self::Images(images) => {
                for (m, layer) in images.layers.into_iter().enumerate() {
                    table.insert(Source::Image(n, m), layer.file);
                }
                table.extend(images.key.map(|fd| (Source::Key(n), fd)));
                table.extend(images.data_file.map(|fd| (Source::DataFile(n), fd)));
                table.extend(images.direct.map(|fd| (Source::DirectImage(n), fd)));
                watches = images.watches;
            }
        }
        Given { making, watches }
    }

    /// Empties its capture: the device is about to work.
    pub(super) fn begin_capture(&self, device: &Device) -> Result<(), Failure> {
        let Self::Net { pcap: Some(pcap), .. } = self else {
            return Ok(());
        };
        nix::unistd::ftruncate(pcap, 0)
            .map_err(|e| Failure::host(format!("{}.pcap: cannot be emptied", device.field)).because(&e))
    }
}

/// What a disk's process works on.
pub(crate) struct Images {
    /// The image first, then its backing files down to the base.
    pub(crate) layers: Vec<Layer>,
    /// A file that holds the passphrase, so that a successor can read it again.
    pub(crate) key: Option<OwnedFd>,
    pub(crate) data_file: Option<OwnedFd>,
    /// The image once more, past the page cache.
    pub(crate) direct: Option<OwnedFd>,
    /// What watches the files that are written.
    pub(crate) watches: Vec<Watch>,
}

/// Of a chain's images, the top first.
pub(super) fn formats(layers: &[Layer]) -> Vec<ImageFormat> {
    layers.iter().map(|layer| layer.format).collect()
}

/// Opens everything; `lines` go to the relays of NICs.
pub(crate) fn open(
    spec: &VmSpec,
    devices: &[Device],
    options: &Options,
    mut lines: Lines,
) -> Result<Inputs, Failure> {
    // First: the holders of private TAPs are processes, which work while the rest is opened.
    let mut backends: Vec<Option<BackendInput>> = devices
        .iter()
        .map(|device| match &device.backend {
            Backend::Net(nic) => open_net(device, nic, options, lines.remove(&device.id)).map(Some),
            _ => Ok(None),
        })
        .collect::<Result<_, _>>()?;
    let Boot { kvm, kernel, initrd } = open_boot(&spec.boot)?;
    for (backend, device) in backends.iter_mut().zip(devices) {
        if backend.is_none() {
            *backend = open_backend(spec, device)?;
        }
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    Ok(Inputs {
        null: null
            .map_err(|e| Failure::host("cannot open /dev/null").because(&e))?
            .into(),
        kvm,
        kernel,
        initrd,
        backends: backends.into_iter().flatten().collect(),
        settled: Vec::new(),
    })
}

/// What every VM is booted from.
pub(super) struct Boot {
    kvm: OwnedFd,
    kernel: OwnedFd,
    initrd: Option<OwnedFd>,
}

pub(super) fn open_boot(boot: &BootSpec) -> Result<Boot, Failure> {
    let (kernel, kind) = open_kernel(boot)?;
    let kvm = kvm::open()?;
    if kind == Kernel::Linux && Path::new("/sys/module/kvm_pvm").exists() {
        return Err(Failure::host(format!(
            "boot.kernel: this host cannot run {}",
            boot.kernel.display()
        ))
        .cause("its KVM is a software KVM (module kvm_pvm), which runs no stock Linux kernel")
        .hint("cargo demo runs it in the nested runner, which has a real KVM by emulation"));
    }
    let initrd = boot
        .initrd
        .as_deref()
        .map(|path| open_file("boot.initrd", path).map(OwnedFd::from))
        .transpose()?;
    Ok(Boot {
        kvm,
        kernel: kernel.into(),
        initrd,
    })
}

/// What a device that is no NIC of ours works on.
pub(super) fn open_backend(spec: &VmSpec, device: &Device) -> Result<Option<BackendInput>, Failure> {
    match &device.backend {
        Backend::Disk(disk) => open_disk(spec, device, disk).map(|images| Some(BackendInput::Images(images))),
        Backend::Net(_) => Ok(None),
        Backend::Passt { passt, publish, mtu } => {
            interruptibly(|| net::serve(&device.field, passt, publish, *mtu))
                .map(|socket| Some(BackendInput::Socket(socket)))
        }
        Backend::External(Remote { socket, .. }) => {
            match interruptibly(|| connect(socket, LISTEN_DEADLINE)) {
                Ok(stream) => Ok(Some(BackendInput::Socket(stream))),
                Err(e) => Err(no_back_end(device, socket, &e)),
            }
        }
    }
}

pub(super) fn no_back_end(device: &Device, socket: &Path, error: &io::Error) -> Failure {
    Failure::host(format!(
        "{}: cannot connect to the back end at {}",
        device.field,
        socket.display()
    ))
    .because(error)
    .hint("start the back end first, with this socket path")
}

/// Waits for whoever is about to listen there.
fn connect(socket: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let address = UnixAddr::new(socket)?;
    let end = Instant::now() + patience;
    loop {
        match connect_within(SockType::Stream, &address, ACCEPT_DEADLINE) {
            Err(e) if is_to_come(&e) && Instant::now() < end => sleep(LISTEN_LOOK),
            Err(e) if is_to_come(&e) => {
                let why = format!("{e}, for {} s", patience.as_secs());
                return Err(io::Error::new(e.kind(), why));
            }
            connected => return connected,
        }
    }
}

/// Nobody listens, or nobody has made the socket.
fn is_to_come(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn open_disk(spec: &VmSpec, device: &Device, disk: &Disk) -> Result<Images, Failure> {
    let layers = open_chain(spec, device, disk, Purpose::Use)?;
    let direct = match layers.first() {
        Some(top) if disk.past_cache => Some(open_direct(device, disk, &top.file)?),
        _ => None,
    };
    let data_file = disk.data_file.as_ref();
    let data_file =
        data_file.map(|path| open_image(&format!("{}.data-file", device.field), path, disk.read_only));
    let data_file = data_file.transpose()?.map(OwnedFd::from);
    let front = format!("{}.", device.field);
    let key = disk.key.as_ref().map(|key| open_key(&front, key)).transpose()?;
    let top = layers.first().map(|layer| &layer.file);
    let written = top.into_iter().chain(&data_file).filter(|_| !disk.read_only);
    let watches = written.map(Watch::begin).collect::<io::Result<_>>();
    Ok(Images {
        watches: watches.map_err(|e| {
            Failure::host(format!("{}: cannot open its image once more", device.field)).because(&e)
        })?,
        layers,
        key,
        data_file,
        direct,
    })
}

/// By the open descriptor, not by its path, which may lead elsewhere by now.
pub(super) fn open_direct(device: &Device, disk: &Disk, image: &OwnedFd) -> Result<OwnedFd, Failure> {
    OpenOptions::new()
        .read(true)
        .write(!disk.read_only)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", image.as_raw_fd()))
        .map(OwnedFd::from)
        .map_err(|e| {
            Failure::host(format!(
                "{}.cache: cannot open {} past the page cache",
                device.field,
                disk.path.display()
            ))
            .because(&e)
            .hint("leave cache=none out: not every file system has O_DIRECT")
        })
}

/// A file is passed on as it is; what comes through an inherited descriptor, which may be a pipe, is
/// copied to memory first. `front` is what the field, or flag, begins with.
pub(crate) fn open_key(front: &str, key: &Key) -> Result<OwnedFd, Failure> {
    match key {
        Key::File(path) => {
            let field = format!("{front}key-file");
            let file = open_key_file(&field, path)?;
            if file.metadata().is_ok_and(|about| about.len() == 0) {
                let failure = Failure::host(format!("{field}: cannot use {}", path.display()));
                return Err(failure.cause("it is empty, and a passphrase is not"));
            }
            Ok(file.into())
        }
        Key::Inherited(number) => interruptibly(|| copy_key(*number)).map_err(|e| no_key(front, *number, &e)),
    }
}

/// The file of a [`Key::File`].
pub(super) fn open_key_file(field: &str, path: &Path) -> Result<File, Failure> {
    open_file(field, path).map_err(|failure| match fs::metadata(path) {
        Ok(about) if !about.is_file() => failure.hint("key-fd=N takes a pipe: key-fd=3 with 3< <(COMMAND)"),
        _ => failure,
    })
}

pub(super) fn no_key(front: &str, number: i32, error: &io::Error) -> Failure {
    Failure::host(format!("{front}key-fd: cannot read descriptor {number}")).because(error)
}

fn copy_key(number: i32) -> io::Result<OwnedFd> {
    let source = File::from(crate::inherit::take(FdNumber(number))?);
    let mut copy = File::from(memfd_create(c"key", MFdFlags::MFD_CLOEXEC)?);
    io::copy(&mut source.take(LONGEST_KEY), &mut copy)?;
    Ok(copy.into())
}

pub(super) fn open_net(
    device: &Device,
    nic: &Nic,
    options: &Options,
    line: Option<OwnedFd>,
) -> Result<BackendInput, Failure> {
    let pcap = nic
        .pcap
        .as_deref()
        .map(|path| net::open_pcap(&device.field, path));
    Ok(BackendInput::Net {
        pcap: pcap.transpose()?.map(OwnedFd::from),
        link: None,
        state: net::link::make_state().map_err(|e| {
            Failure::host(format!("{}: cannot make memory for its state", device.field)).because(&e)
        })?,
        tap: net::open(device, nic, options, line)?,
    })
}

fn open_kernel(boot: &BootSpec) -> Result<(File, Kernel), Failure> {
    let field = "boot.kernel";
    let file = open_file(field, &boot.kernel)?;
    let bad = |e: &dyn std::error::Error| {
        Failure::host(format!("{field}: {} cannot be booted", boot.kernel.display())).because(e)
    };
    let length = file.metadata().map_err(|e| bad(&e))?.len();
    let read_at = |offset: u64, most: usize| {
        let mut bytes = vec![0; most];
        let n = file.read_at(&mut bytes, offset).unwrap_or(0);
        bytes.truncate(n);
        bytes
    };
    let kind = kernel::identify(&read_at(0, kernel::FRONT), length, &read_at).map_err(|e| {
        bad(&e).hint("give an uncompressed vmlinux with a PVH note, or a bzImage (/boot/vmlinuz)")
    })?;
    Ok((file, kind))
}

/// Why `path` could not be opened. Shells replace `~` in front of a word only, and nobody does in a spec.
pub(super) fn unopened(failure: Failure, path: &Path, error: &io::Error) -> Failure {
    let failure = failure.because(error);
    match path.components().any(|part| part.as_os_str() == "~") {
        true => failure.hint("'~' is the shell's, at the front of a word: write the folder itself"),
        false => failure,
    }
}

/// A regular file for reading.
pub(super) fn open_file(field: &str, path: &Path) -> Result<File, Failure> {
    let failed = || Failure::host(format!("{field}: cannot open {}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| unopened(failed(), path, &e))?;
    if file.metadata().map_err(|e| failed().because(&e))?.is_file() {
        Ok(file)
    } else {
        Err(failed().cause("it is not a regular file"))
    }
}

impl Inputs {
    /// For each device the formats of its image chain, the top first; empty where it has none.
    pub(super) fn chains(&self) -> Vec<Vec<ImageFormat>> {
        let chain = |backend: &BackendInput| match backend {
            BackendInput::Images(images) => formats(&images.layers),
            _ => Vec::new(),
        };
        self.backends.iter().map(chain).collect()
    }

    /// Makes the pipes for orders to NICs' links.
    pub(crate) fn make_links(&mut self, run_dir: &RunDir, devices: &[Device]) -> Result<(), Failure> {
        for (backend, device) in self.backends.iter_mut().zip(devices) {
            if let BackendInput::Net { link, .. } = backend {
                *link = Some(net::link::make(run_dir.path(), &device.id).map_err(|e| {
                    Failure::host(format!("{}: cannot make a pipe for its link", device.field)).because(&e)
                })?);
            }
        }
        Ok(())
    }

    /// Empties the captures: the VM is about to run.
    pub(crate) fn begin_captures(&self, devices: &[Device]) -> Result<(), Failure> {
        let mut all = self.backends.iter().zip(devices);
        all.try_for_each(|(backend, device)| backend.begin_capture(device))
    }

    /// The disk that the image of `device` lies on, by major and minor number.
    pub(crate) fn disk_of(&self, device: usize) -> Option<(u64, u64)> {
        let Some(BackendInput::Images(images)) = self.backends.get(device) else {
            return None;
        };
        let about = nix::sys::stat::fstat(&images.layers.first()?.file).ok()?;
        disk_behind(about.st_dev)
    }

    /// Waits for the TAPs that are being made, for who needs every descriptor at hand.
    pub(crate) fn settle(&mut self) -> Result<(), Failure> {
        self.settled = self.holders().into_iter().map(|(_, holder)| holder).collect();
        for backend in &mut self.backends {
            if let BackendInput::Net { tap, .. } = backend
                && let net::Opened::Making(holder) = tap
            {
                let taps = holder.receive().map_err(|e| net::not_made(&holder.field, &e))?;
                *tap = net::Opened::Ready(taps);
            }
        }
        Ok(())
    }

    /// The processes that hold what TAPs need, and for which device.
    pub(crate) fn holders(&self) -> Vec<(usize, net::Holder)> {
        let holder = |(device, backend): (usize, &BackendInput)| match backend {
            BackendInput::Net {
                tap: net::Opened::Making(holder),
                ..
            } => Some((device, holder.share())),
            _ => None,
        };
        self.backends.iter().enumerate().filter_map(holder).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_back_end_that_is_about_to_listen_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let connect_within_s = |seconds| connect(&path, Duration::from_secs(seconds));
        let missing = connect_within_s(0).unwrap_err().to_string();
        assert!(
            missing.contains("No such file") && missing.ends_with(", for 0 s"),
            "{missing}"
        );
        std::thread::scope(|scope| {
            let connecting = scope.spawn(|| connect_within_s(60));
            let _listener = UnixListener::bind(&path).unwrap();
            connecting.join().unwrap().unwrap();
        });
        // The socket of one that is gone.
        let refused = connect_within_s(0).unwrap_err().to_string();
        assert!(refused.contains("refused"), "{refused}");
    }
}
