//! One run of a test guest under `bulkhead run`.

use super::KernelImages;
use crate::artifacts::Artifact;
use crate::demo::peer::Peer;
use crate::host::NESTED;
use crate::nested::agent::run_here;
use crate::nested::{Ended, Job, Stream};
use crate::suite::{artifact, jail_flags};
use anyhow::{Context, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::AsRawFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vm_spec::disk::DiskSpec;
use vm_spec::net::NetSpec;
use vm_spec::size::ByteSize;
use vm_spec::spec::{BootSpec, ImageFormat, OnReboot, VmSpec};

/// How the kernel is started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loader {
    /// The uncompressed ELF by its PVH note.
    Pvh,
    /// The bzImage by the 64-bit Linux boot protocol.
    BzImage,
}

/// A guest's disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Disk {
    /// A qcow2 image that our own process serves.
    Qcow2(PathBuf),
    /// The socket of someone else's vhost-user-blk back end.
    Socket(PathBuf),
}

/// What a run is to be.
#[derive(Clone, Debug)]
pub struct Launch {
    /// How the kernel is started.
    pub loader: Loader,
    /// vCPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// The disk, if any.
    pub disk: Option<Disk>,
    /// A page to fetch through a NIC; no NIC if none.
    pub page: Option<String>,
    /// Further NICs.
    pub nets: Vec<NetSpec>,
    /// How often the guest reboots itself before it powers off.
    pub reboots: u32,
    /// Further words of the kernel's command line.
    pub words: &'static str,
    /// What it runs in place of its init, in the initial RAM disk.
    pub command: &'static [&'static str],
    /// Size of the pages behind its RAM in bytes.
    pub huge_pages: Option<u64>,
    /// Who runs it, if not this user; see [`Work::give_to`].
    pub user: Option<u32>,
    /// How long it may take.
    pub deadline: Duration,
}

impl Launch {
    /// By PVH, one CPU, 128 MiB, no device.
    #[must_use]
    pub fn small(deadline: Duration) -> Self {
        Self {
            loader: Loader::Pvh,
            cpus: 1,
            memory_mib: 128,
            disk: None,
            page: None,
            nets: Vec::new(),
            reboots: 0,
            words: "",
            command: &[],
            huge_pages: None,
            user: None,
            deadline,
        }
    }
}

/// What became of it.
#[derive(Debug)]
pub struct Ran {
    /// The guest's reports, without their prefix.
    pub reports: Vec<String>,
    /// Everything on the console.
    pub console: String,
    /// What bulkhead said.
    pub stderr: String,
    /// How bulkhead ended.
    pub ended: Ended,
}

/// Scratch folder and images of a series of runs.
#[derive(Debug)]
pub struct Work {
    folder: tempfile::TempDir,
    kernel: KernelImages,
}

impl Work {
    /// A folder for runs of this kernel. In the nested runner the images are copied out of the
    /// host's tree, where reading is slow.
    ///
    /// # Errors
    /// The file system's.
    pub fn new(kernel: &KernelImages) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("linux-").tempdir()?;
        let mut work = Self {
            folder,
            kernel: kernel.clone(),
        };
        if std::env::var_os(NESTED).is_some() {
            work.copy_images()?;
        }
        Ok(work)
    }

    fn copy_images(&mut self) -> anyhow::Result<()> {
        let kernel = &mut self.kernel;
        for path in [&mut kernel.elf, &mut kernel.bzimage, &mut kernel.initrd] {
            let name = path.file_name().context("an image without a name")?;
            let copy = self.folder.path().join(name);
            if *path != copy {
                std::fs::copy(&*path, &copy)?;
                *path = copy;
            }
        }
        Ok(())
    }

    /// Makes the folder, everything in it and the images a user's own, for [`Launch::user`].
    ///
    /// # Errors
    /// Only root may.
    pub fn give_to(&mut self, user: u32) -> anyhow::Result<()> {
        self.copy_images()?;
        chown(self.path(), Some(user), Some(user))?;
        for entry in std::fs::read_dir(self.path())? {
            chown(entry?.path(), Some(user), Some(user))?;
        }
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &KernelImages {
        &self.kernel
    }

    /// Runs a guest to its end.
    ///
    /// # Errors
    /// bulkhead or the TAP's other side cannot be started.
    pub fn run(&self, launch: &Launch) -> anyhow::Result<Ran> {
        self.run_with(launch, &mut |_| Ok(()))
    }

    /// As [`Self::run`], and hands on each of the guest's reports while it waits for what that causes.
    ///
    /// # Errors
    /// As there; or the first of `on_report`, once the guest has ended.
    pub fn run_with(
        &self,
        launch: &Launch,
        on_report: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Ran> {
        let mut peer = launch.page.as_deref().map(Peer::start).transpose()?;
        if let Some(peer) = &mut peer {
            peer.answer_at_once()?;
            // bulkhead inherits the TAP under the number that the spec names.
            fcntl(&peer.tap, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        let file = self.write_spec(launch, peer.as_ref())?;
        let bulkhead = artifact(Artifact::Bulkhead)?.to_string_lossy();
        let file = file.to_string_lossy();
        let words = [&[&*bulkhead, "run", &*file], jail_flags()].concat();
        let mut job = Job::new(&words, launch.deadline);
        job.environment.insert(
            "XDG_RUNTIME_DIR".to_owned(),
            self.path().to_string_lossy().into_owned(),
        );
        job.user = launch.user;
        let (mut console, mut stderr, mut told, mut result) = (Vec::new(), Vec::new(), 0, Ok(()));
        let ended = run_here(&job, &mut |stream, bytes| match stream {
            Stream::Out => {
                console.extend_from_slice(bytes);
                let all = reports(&console);
                for report in all.iter().skip(told) {
                    if result.is_ok() {
                        result = on_report(report);
                    }
                }
                told = all.len();
            }
            Stream::Err => stderr.extend_from_slice(bytes),
        });
        let reports = reports(&console);
        let console = String::from_utf8_lossy(&console).into_owned();
        let said = || format!("the console:\n{console}");
        result.with_context(said)?;
        Ok(Ran {
            reports,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            console,
            ended,
        })
    }

    /// Writes the spec of a run, as a person would.
    ///
    /// # Errors
    /// The file system's.
    pub fn write_spec(&self, launch: &Launch, peer: Option<&Peer>) -> anyhow::Result<PathBuf> {
        let file = self.path().join("guest.toml");
        std::fs::write(&file, toml::to_string(&self.spec(launch, peer))?)?;
        Ok(file)
    }

    fn spec(&self, launch: &Launch, peer: Option<&Peer>) -> VmSpec {
        let kernel = match launch.loader {
            Loader::Pvh => self.kernel.elf.clone(),
            Loader::BzImage => self.kernel.bzimage.clone(),
        };
        let mut cmdline = format!("console=ttyS0 quiet mitigations=off panic=-1 {}", launch.words);
        if launch.reboots > 0 {
            cmdline += &format!(" guest.reboots={}", launch.reboots);
        }
        VmSpec {
            name: None,
            boot: BootSpec {
                kernel,
                initrd: Some(self.kernel.initrd.clone()),
                cmdline,
                command: launch.command.iter().map(|&word| word.to_owned()).collect(),
            },
            cpus: launch.cpus,
            memory: ByteSize(launch.memory_mib << 20),
            huge_pages: launch.huge_pages.map(ByteSize),
            disks: launch.disk.iter().map(disk_spec).collect(),
            nets: peer
                .map(|peer| net_spec(peer.tap.as_raw_fd()))
                .into_iter()
                .chain(launch.nets.iter().cloned())
                .collect(),
            vhost_user: Vec::new(),
            on_device_death: vm_spec::spec::OnDeviceDeath::default(),
            hotplug: 0,
            on_reboot: if launch.reboots > 0 {
                OnReboot::Restart
            } else {
                OnReboot::Exit
            },
            power_off_grace: 10,
            limits: vm_spec::spec::LimitsSpec::default(),
            image_folders: Vec::new(),
        }
    }
}

impl Ran {
    /// Fails with everything that was said unless the guest reached its end and powered off.
    ///
    /// # Errors
    /// See above.
    pub fn expect_power_off(&self) -> anyhow::Result<()> {
        let complete = self.reports.last().is_some_and(|report| report == "end");
        ensure!(
            self.ended.success() && complete,
            "bulkhead ended with {:?}; it said:\n{}\nthe console:\n{}",
            self.ended,
            self.stderr,
            self.console
        );
        Ok(())
    }

    /// What the guest reported about `subject`.
    ///
    /// # Errors
    /// It reported nothing about it.
    pub fn report(&self, subject: &str) -> anyhow::Result<&str> {
        let mut about = self
            .reports
            .iter()
            .filter_map(|report| report.strip_prefix(subject)?.strip_prefix(' '));
        about
            .next()
            .with_context(|| format!("no report about '{subject}'; the console:\n{}", self.console))
    }
}

/// The guest's reports on lines that are complete.
fn reports(console: &[u8]) -> Vec<String> {
    let end = console
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let console = String::from_utf8_lossy(&console[..end]);
    let reports = console.lines().filter_map(|line| line.strip_prefix("guest: "));
    reports.map(|report| report.trim_end().to_owned()).collect()
}

fn disk_spec(disk: &Disk) -> DiskSpec {
    let (path, format, vhost_user) = match disk {
        Disk::Qcow2(path) => (Some(path.clone()), Some(ImageFormat::Qcow2), None),
        Disk::Socket(socket) => (None, None, Some(socket.clone())),
    };
    DiskSpec {
        path,
        format,
        vhost_user,
        ..DiskSpec::default()
    }
}

fn net_spec(tap: i32) -> NetSpec {
    NetSpec {
        tap_fd: vec![tap],
        ..NetSpec::default()
    }
}
