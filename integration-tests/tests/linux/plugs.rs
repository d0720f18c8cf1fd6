//! Devices that are attached to a running Linux guest, and detached: disks of ours and of someone else's, a NIC, across a
//! reboot, and while their processes are killed.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use crate::storm::strike_named;
use anyhow::{Context, Result, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::demo::peer::Peer;
use integration_tests::host::Host;
use integration_tests::linux::Work;
use integration_tests::process::Process;
use integration_tests::qemu_img::qemu_img_in;
use integration_tests::suite::{artifact, test_within};
use integration_tests::tiny::Run;
use libtest_mimic::Trial;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use vm_spec::run_state::{ProcessRole, RunState};

/// Everything is slow on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(60);
const CMDLINE: &str = "console=ttyS0 quiet mitigations=off panic=-1 guest.plugs=1";

pub(crate) fn tests() -> Vec<Trial> {
    vec![test_within(
        2 * BOOT + 10 * PATIENCE,
        "disks and a NIC come and go",
        come_and_go,
    )]
}

/// A VM, and what is said to it.
struct Vm {
    run: Run,
    folder: std::path::PathBuf,
}

impl Vm {
    /// Types a line at the guest and waits for what it says.
    fn ask(&mut self, line: &str, answer: &str) -> Result<()> {
        for key in line.bytes().chain([b'\n']) {
            self.run.press(key)?;
        }
        self.hear(answer)
    }

    fn hear(&mut self, answer: &str) -> Result<()> {
        let heard = self.run.console.wait_line(&format!("guest: {answer}"), PATIENCE);
        heard.with_context(|| self.run.process.stderr().unwrap_or_default() + &self.run.console.text())
    }

    fn attach(&self, flag: &str) -> Result<Output> {
        Ok(self
            .run
            .verb("attach", &[flag])?
            .current_dir(&self.folder)
            .output()?)
    }

    /// Attaches a device, and says where it is.
    fn attached(&self, flag: &str) -> Result<String> {
        is_attached(flag, self.attach(flag)?)
    }

    fn not_attached(&self, flag: &str, words: &[&str]) -> Result<()> {
        let output = self.attach(flag)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{flag}: attached");
        ensure!(words.iter().all(|word| said.contains(word)), "{flag}: {said}");
        Ok(())
    }

    fn detached(&self, device: &str) -> Result<()> {
        let output = self.run.verb("detach", &[device])?.output()?;
        ensure!(output.status.success(), "{device}: {output:?}");
        Ok(())
    }

    fn state(&mut self) -> Result<RunState> {
        self.run.state(PATIENCE)
    }
}

fn is_attached(flag: &str, output: Output) -> Result<String> {
    ensure!(output.status.success(), "{flag}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn come_and_go() -> Result<()> {
    Host::need_linux_kvm()?;
    let work = Work::new(default_kernel()?)?;
    let folder = work.path().to_owned();
    for (name, size) in [("a.raw", 16u64 << 20), ("c.raw", 16 << 20), ("d.raw", 4096)] {
        File::create(folder.join(name))?.set_len(size)?;
    }
    let image = folder.join("b.qcow2");
    qemu_img_in(work.path(), &["create", "-q", "-f", "qcow2", "b.qcow2", "16M"])?;
    let flags = [
        format!("--kernel={}", work.kernel().elf.display()),
        format!("--initrd={}", work.kernel().initrd.display()),
        format!("--cmdline={CMDLINE}"),
        "--memory=192M".to_owned(),
        "--hotplug=2".to_owned(),
        "--limits=pids=50,cpu-percent=400".to_owned(),
        format!("--disk=path={},format=raw", folder.join("a.raw").display()),
        "--net=private=10.213.11.1/24,id=own".to_owned(),
    ];
    let mut run = Run::with_flags(&flags)?;
    run.console.wait_line("guest: plugs", BOOT)?;
    let mut vm = Vm { run, folder };
    disk_of_ours(&mut vm, &image)?;
    nic(&mut vm)?;
    bridged(&mut vm)?;
    refused(&vm)?;
    someone_elses(&mut vm)?;
    // The machine is as it was when it boots again.
    vm.ask("reboot", "plugs")?;
    vm.ask("filled vdb", "is filled vdb")?;
    vm.ask("filled vdc", "is filled vdc")?;
    // One that was there from the start goes too.
    vm.detached("disk0")?;
    vm.ask("gone vda", "gone vda")?;
    vm.detached("disk1")?;
    vm.ask("gone vdb", "gone vdb")?;
    private_nic_goes(&mut vm)?;
    together(&vm)?;
    qemu_img_in(work.path(), &["check", "-q", "b.qcow2"])?;
    let at = vm.attached("--disk=path=a.raw,format=raw,id=again,slot=1")?;
    ensure!(at.starts_with("again: in PCI slot 1,"), "{at}");
    vm.ask("fill vda", "filled vda")?;
    vm.ask("end", "end")?;
    let status = vm.run.wait(GRACE)?;
    ensure!(status.success(), "{status}: {}", vm.run.process.stderr()?);
    ensure!(!vm.run.run_folder().exists(), "the run-time folder is left");
    Ok(())
}

/// It is as any other of the VM's: in a jail, locked, and replaced where its process dies.
fn disk_of_ours(vm: &mut Vm, image: &Path) -> Result<()> {
    let at = vm.attached("--disk=path=b.qcow2,format=qcow2")?;
    ensure!(at.starts_with("disk1: in PCI slot 3, served by pid "), "{at}");
    let state = vm.state()?;
    let jailed = |name: &str| {
        state
            .processes
            .iter()
            .any(|p| p.name == name && p.jailed && p.fds.len() > 4)
    };
    ensure!(jailed("disk1"), "{state:?}");
    is_limited(&state, "disk1")?;
    let locked = Command::new("qemu-img").arg("info").arg(image).output()?;
    let said = String::from_utf8_lossy(&locked.stderr);
    ensure!(
        !locked.status.success() && said.contains("lock"),
        "nobody locks {}: {said}",
        image.display()
    );
    for key in b"fill vdb\n" {
        vm.run.press(*key)?;
    }
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        strike_named(&mut vm.run, "disk1")?;
    }
    vm.hear("filled vdb")?;
    vm.ask("filled vdb", "is filled vdb")
}

/// It has a group of its own, with the limits of each process.
fn is_limited(state: &RunState, name: &str) -> Result<()> {
    let process = state.processes.iter().find(|process| process.name == name);
    let pid = process.context("no such process")?.pid;
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let group = Path::new("/sys/fs/cgroup").join(own.context("it is in no group")?);
    let read = |file| fs::read_to_string(group.join(file));
    ensure!(read("pids.max")?.trim() == "50", "{}", group.display());
    ensure!(
        read("cgroup.procs")?.trim() == pid.to_string(),
        "it is not alone in {}",
        group.display()
    );
    Ok(())
}

/// One that was there from the start takes its namespace along.
fn private_nic_goes(vm: &mut Vm) -> Result<()> {
    let held = |state: &RunState| {
        let mut processes = state.processes.iter();
        processes
            .find(|p| p.role == ProcessRole::NetNamespace)
            .map(|p| p.pid)
    };
    let holder = held(&vm.state()?).context("nobody holds the NIC's namespace")?;
    vm.detached("own")?;
    vm.ask("gone eth0", "gone eth0")?;
    let end = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{holder}")).exists() {
        ensure!(Instant::now() < end, "the namespace is held");
        thread::sleep(Duration::from_millis(10));
    }
    ensure!(held(&vm.state()?).is_none(), "the state tells of it");
    Ok(())
}

/// Each of two that ask at the same time has an id of its own.
fn together(vm: &Vm) -> Result<()> {
    let flags = ["a.raw", "d.raw"].map(|name| format!("--disk=path={name},format=raw"));
    let mut asked = Vec::new();
    for flag in &flags {
        let mut verb = vm.run.verb("attach", &[flag])?;
        let verb = verb.current_dir(&vm.folder);
        asked.push(verb.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    }
    let mut said = Vec::new();
    for (flag, child) in flags.iter().zip(asked) {
        said.push(is_attached(flag, child.wait_with_output()?)?);
    }
    for disk in ["disk0", "disk1"] {
        ensure!(
            said.iter().any(|line| line.starts_with(&format!("{disk}: "))),
            "{said:?}"
        );
        vm.detached(disk)?;
    }
    Ok(())
}

/// A NIC comes, answers and goes; its process goes with it.
fn nic(vm: &mut Vm) -> Result<()> {
    let peer = Peer::start("")?;
    fcntl(&peer.tap, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let flag = format!("--net=tap-fd={}", peer.tap.as_raw_fd());
    vm.attached(&flag)?;
    vm.not_attached(
        "--disk=path=c.raw,format=raw",
        &["no PCI slot is left", "hotplug"],
    )?;
    vm.ask("ping eth1", "icmp 3")?;
    let link = vm.run.verb("link", &["net0", "down"])?.output()?;
    ensure!(link.status.success(), "{link:?}");
    vm.detached("net0")?;
    vm.ask("gone eth1", "gone eth1")?;
    let state = vm.state()?;
    ensure!(!state.processes.iter().any(|p| p.name == "net0"), "{state:?}");
    ensure!(!vm.run.run_folder().join("net0.link").exists());
    Ok(())
}

/// Its TAP is made for it, and goes with it. Two that come at the same moment under one id: one of them is the
/// VM's, and takes orders for its link.
fn bridged(vm: &mut Vm) -> Result<()> {
    let ip = |words: &[&str]| -> Result<()> {
        let output = Command::new("ip").args(words).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    let ports = || Ok::<_, anyhow::Error>(fs::read_dir("/sys/class/net/plugs/brif")?.count());
    ip(&["link", "add", "plugs", "type", "bridge"])?;
    vm.detached("disk1")?;
    let begin = || -> Result<Child> {
        let mut command = vm.run.verb("attach", &["--net=bridge=plugs,id=twin"])?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn()?)
    };
    let both = [begin()?, begin()?].map(Child::wait_with_output);
    let both = both.into_iter().collect::<std::io::Result<Vec<_>>>()?;
    let attached = both.iter().filter(|output| output.status.success()).count();
    ensure!(attached == 1 && ports()? == 1, "{both:?}");
    let link = vm.run.verb("link", &["twin", "down"])?.output()?;
    ensure!(link.status.success(), "{link:?}");
    let of_links = |entry: &fs::DirEntry| entry.path().extension() == Some(OsStr::new("link"));
    let pipes = fs::read_dir(vm.run.run_folder())?
        .flatten()
        .filter(of_links)
        .count();
    // And that of the NIC which was there from the start.
    ensure!(pipes == 2, "{pipes} pipes");
    vm.detached("twin")?;
    ensure!(ports()? == 0, "its TAP is left");
    ip(&["link", "del", "plugs"])?;
    vm.attached("--disk=path=b.qcow2,format=qcow2")?;
    vm.ask("filled vdb", "is filled vdb")
}

/// What cannot be attached leaves nothing, and its slot is free.
fn refused(vm: &Vm) -> Result<()> {
    vm.not_attached("--disk=path=c.raw,format=qcow2", &["disk[2].path", "qcow2 magic"])?;
    // One that only its process refuses: its L1 table begins within a sector.
    let bad = vm.folder.join("bad.qcow2");
    qemu_img_in(&vm.folder, &["create", "-q", "-f", "qcow2", "bad.qcow2", "16M"])?;
    File::options()
        .write(true)
        .open(&bad)?
        .write_all_at(&7u64.to_be_bytes(), 40)?;
    vm.not_attached(
        "--disk=path=bad.qcow2,format=qcow2",
        &["disk2 was not attached", "bulkhead logs"],
    )?;
    let logs = vm.run.verb("logs", &[])?.output()?;
    let said = String::from_utf8_lossy(&logs.stdout).into_owned();
    ensure!(
        said.contains("disk2") && said.contains("l1_table_offset"),
        "{said}"
    );
    vm.not_attached("--disk=path=missing,format=raw", &["disk[2].path", "missing"])?;
    vm.not_attached(
        "--disk=path=c.raw,format=raw,id=disk0",
        &["disk0", "another device's id"],
    )?;
    vm.not_attached("--disk=path=c.raw,format=raw,slot=1", &["slot 1 is taken"])?;
    vm.not_attached("--net=user", &["at a VM's start only"])?;
    vm.not_attached("--disk=vhost-user=nowhere", &["start the back end first"])?;
    let missing = vm.run.verb("detach", &["disk9"])?.output()?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(
        !missing.status.success() && said.contains("no device 'disk9'"),
        "{said}"
    );
    Ok(())
}

/// A back end that was started by hand.
fn someone_elses(vm: &mut Vm) -> Result<()> {
    let socket = vm.folder.join("socket");
    let mut command = Command::new(artifact(Artifact::VhostUserBlk)?);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--blk-file={}", vm.folder.join("c.raw").display()))
        .arg("--format=raw");
    let daemon = Process::start(command)?;
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        ensure!(Instant::now() < end, "no socket: {}", daemon.stderr()?);
        thread::sleep(Duration::from_millis(10));
    }
    let flag = format!("--disk=vhost-user={}", socket.display());
    let at = vm.attached(&flag)?;
    ensure!(at == "disk2: in PCI slot 4\n", "{at}");
    vm.ask("fill vdc", "filled vdc")?;
    vm.detached("disk2")?;
    vm.ask("gone vdc", "gone vdc")?;
    // It has locked the image as long as it lives.
    drop(daemon);
    vm.attached("--disk=path=c.raw,format=raw").map(drop)?;
    vm.ask("filled vdc", "is filled vdc")
}
