//! `--net`: every way that needs no more than this host's kernel, with tiny guests.

use crate::{
    jails::{Place, empty_root, filtered},
    run::gone,
    traces::Traces,
};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    lent::{Lent, NOBODY, become_nobody},
    process::Process,
    suite::{Skip, artifact, test},
    tiny::{Events, Run},
};
use libtest_mimic::Trial;
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket},
    },
    unistd::{Pid, Uid},
};
use std::{
    fs,
    net::UdpSocket,
    os::{fd::AsRawFd, unix::fs::chown},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vm_spec::{events::EventKind, run_state::ProcessRole};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// Nothing is left this long after a VM's end.
const GONE: Duration = Duration::from_secs(5);
/// Frames that one guest sends and another answers.
const FRAMES: u64 = 500;
/// Of a capture's file, and of a frame in it.
const CAPTURE_HEADER: u64 = 24;
const RECORD_HEADER: u64 = 16;
/// Two VMs that have one name would have one address, too.
const ASKING: &str = "mac=02:00:00:00:00:0a";
/// The port in the guest that `net-user` listens on.
pub(crate) const GUEST_PORT: u16 = 7;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("net::isolated", isolated),
        test("net::isolated_keeper_killed", keeper_killed),
        test("net::isolated_name_squatted (waits)", squatted),
        test("net::user", user),
        test("net::user_without_passt", without_passt),
        test("net::bridge", bridge),
        test("net::limits", limits),
    ]
}

/// A name that no other run of this test uses.
pub(crate) fn segment(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// Whether the keeper of a segment of ours listens.
pub(crate) fn kept(segment: &str) -> Result<bool> {
    kept_by(Uid::effective().as_raw(), segment)
}

/// Whether that of a user's segment does.
pub(crate) fn kept_by(user: u32, segment: &str) -> Result<bool> {
    let name = format!("@bulkhead/{user}/{segment}");
    let sockets = fs::read_to_string("/proc/net/unix")?;
    Ok(sockets.lines().any(|line| line.ends_with(&name)))
}

pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + GONE;
    while !reached()? {
        ensure!(Instant::now() < end, "{what} not after {GONE:?}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn started(cmdline: &str, net: &str, line: &str) -> Result<Run> {
    let mut run = Run::tiny(cmdline, &[format!("--net={net}")])?;
    run.console
        .wait_line(line, DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    Ok(run)
}

pub(crate) fn expect_ok(run: &mut Run) -> Result<()> {
    run.wait(DEADLINE)?;
    let said = || run.process.stderr().unwrap_or_default();
    run.console.expect_ok().with_context(said)
}

/// Two VMs hear each other; a third, on another segment, hears neither and is not heard.
fn isolated() -> Result<()> {
    Host::need_tun()?;
    let folder = tempfile::tempdir()?;
    let capture = folder.path().join("pcap");
    let (lab, other) = (segment("lab"), segment("other"));
    // Would be answered, and end, if anyone heard it.
    let mut stranger = started(
        "scenario=net packets=1",
        &format!("isolated={other}"),
        "scenario=net",
    )?;
    let echo = format!("scenario=net-echo packets={FRAMES}");
    let mut answering = started(&echo, &format!("isolated={lab}"), "ready=1")?;
    let cmdline = format!("scenario=net packets={FRAMES} depth=16");
    let net = format!("{ASKING},isolated={lab},queues=2,pcap={}", capture.display());
    let mut asking = Run::tiny(&cmdline, &[format!("--net={net}")])?;
    expect_ok(&mut asking)?;
    expect_ok(&mut answering)?;
    ensure!(
        asking.console.number("strangers")? == 0,
        "{}",
        asking.console.text()
    );
    if Uid::effective().is_root() {
        holder_sees_no_path(&mut stranger)?;
    }
    ensure!(
        !stranger.console.text().contains("echoed"),
        "a VM on another segment was heard"
    );
    let frames = 2 * FRAMES * (RECORD_HEADER + guest_contract::FRAME_LENGTH as u64);
    let length = fs::metadata(&capture)?.len();
    ensure!(
        length == CAPTURE_HEADER + frames,
        "the capture has {length} bytes"
    );
    wait_until("the segment goes with its last VM", || Ok(!kept(&lab)?))?;
    ensure!(kept(&other)?, "the other segment ended with its VM still there");
    drop(stranger);
    wait_until("the segment goes with a VM that is killed", || Ok(!kept(&other)?))
}

/// A VM ends rather than stay on a segment that no other could join.
fn keeper_killed() -> Result<()> {
    Host::need_tun()?;
    let name = segment("keeper");
    let mut run = started("scenario=hlt", &format!("isolated={name}"), "ready=1")?;
    let state = run.state(DEADLINE)?;
    let member = state
        .processes
        .iter()
        .find(|p| p.role == ProcessRole::NetNamespace);
    let member = member.context("no member in state.json")?.pid;
    let traces = Traces::of(run.process.pid().as_raw(), run.folder())?;
    kill(Pid::from_raw(keeper_beside(member)?), Signal::SIGKILL)?;
    gone(&mut run, &traces)?;
    ensure!(!run.process.wait(DEADLINE)?.success(), "the VM went on");
    wait_until("the segment's name is free", || Ok(!kept(&name)?))
}

/// The keeper leads a session of its own, and has its first member for a parent.
fn keeper_beside(member: i32) -> Result<i32> {
    let first = children(member)?.into_iter().next();
    first.context("the member has no child")
}

/// Whoever listens at a segment's name and lets nobody in delays a VM for some seconds; nothing waits there
/// for longer, however the launcher ended.
fn squatted() -> Result<()> {
    Host::need_tun()?;
    let name = segment("squatted");
    let kind = SockType::SeqPacket;
    let seqpacket = |flags| socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC | flags, None);
    let squatter = seqpacket(SockFlag::empty())?;
    let unix = UnixAddr::new_abstract(format!("bulkhead/{}/{name}", Uid::effective()).as_bytes())?;
    bind(squatter.as_raw_fd(), &unix)?;
    listen(&squatter, Backlog::new(0)?)?;
    let mut waiting = Vec::new();
    loop {
        let one = seqpacket(SockFlag::SOCK_NONBLOCK)?;
        match connect(one.as_raw_fd(), &unix) {
            Ok(()) => waiting.push(one),
            Err(Errno::EAGAIN) => break,
            Err(e) => bail!(e),
        }
    }
    let launch = || Run::tiny("scenario=hlt", &[format!("--net=isolated={name}")]);
    let mut run = launch()?;
    let status = run.wait(DEADLINE / 2)?;
    let said = run.process.stderr()?;
    ensure!(status.code() == Some(1), "{status}: {said}");
    ensure!(
        said.contains("net[0].isolated: ") && said.contains("let nobody in"),
        "{said}"
    );
    let mut run = launch()?;
    let launcher = run.process.pid();
    let mut member = 0;
    wait_until("a member waits", || {
        member = children(launcher.as_raw())?
            .into_iter()
            .find(|pid| waits_to_connect(*pid))
            .unwrap_or(0);
        Ok(member != 0)
    })?;
    run.process.signal(Signal::SIGKILL)?;
    run.wait(DEADLINE)?;
    // Whoever adopts it may be slow to reap it.
    let over = || {
        let status = fs::read_to_string(format!("/proc/{member}/status"));
        status.map_or(true, |status| status.contains("State:\tZ"))
    };
    let end = Instant::now() + Duration::from_secs(1);
    while !over() {
        ensure!(Instant::now() < end, "the member {member} outlives its launcher");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn children(pid: i32) -> Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    text.split_whitespace()
        .map(|pid| pid.parse().context("children"))
        .collect()
}

/// By its system call.
fn waits_to_connect(pid: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    call.starts_with(&format!("{} ", nix::libc::SYS_connect))
}

/// DHCP, a datagram out and back, and a published port of a second passt, as a user who owns nothing.
fn user() -> Result<()> {
    Host::need_tun()?;
    Host::need_passt()?;
    let peer = UdpSocket::bind("127.0.0.1:0")?;
    peer.set_read_timeout(Some(DEADLINE))?;
    // Freed at once: nobody else asks for it within this test.
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let flags = |kernel: &Path| -> Result<Vec<String>> {
        Ok(vec![
            format!("--kernel={}", kernel.display()),
            "--memory=64M".to_owned(),
            format!("--cmdline=scenario=net-user peer={}", peer.local_addr()?.port()),
            format!("--net=user,publish=127.0.0.1:{port}:{GUEST_PORT}/udp"),
        ])
    };
    if Uid::effective().is_root() {
        let _lent = Lent::to(NOBODY)?;
        let place = Place::make()?;
        let flags = flags(&place.path("tiny-guest"))?;
        let run = Run::by(become_nobody(&place.path("bulkhead")), nobodys_folder()?, &flags)?;
        converse(run, &peer, port)
    } else {
        let flags = flags(artifact(Artifact::TinyGuest)?)?;
        converse(Run::with_flags(&flags)?, &peer, port)
    }
}

pub(crate) fn nobodys_folder() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    Ok(folder)
}

fn converse(mut run: Run, peer: &UdpSocket, port: u16) -> Result<()> {
    let mut bytes = [0; 64];
    let (length, from) = peer.recv_from(&mut bytes).with_context(|| {
        format!(
            "{}\n{}",
            run.console.text(),
            run.process.stderr().unwrap_or_default()
        )
    })?;
    ensure!(&bytes[..length] == b"outbound", "{:?}", &bytes[..length]);
    peer.send_to(&bytes[..length], from)?;
    run.console.wait_line("ready=1", DEADLINE)?;
    relay_is_confined(&mut run)?;
    passt_dies(&run, port)?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.set_read_timeout(Some(DEADLINE))?;
    client.send_to(b"published", ("127.0.0.1", port))?;
    let length = client.recv(&mut bytes).with_context(|| {
        format!(
            "{}\n{}",
            run.console.text(),
            run.process.stderr().unwrap_or_default()
        )
    })?;
    ensure!(&bytes[..length] == b"published", "{:?}", &bytes[..length]);
    expect_ok(&mut run)?;
    ensure!(
        run.console.value("dns")? != "[0, 0, 0, 0]",
        "DHCP named no server"
    );
    Ok(())
}

/// It dies, and another takes its place and its ports.
fn passt_dies(run: &Run, port: u16) -> Result<()> {
    let published = format!("127.0.0.1/{port}:{GUEST_PORT}");
    let has = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words
            .split(|byte| *byte == 0)
            .any(|word| word == published.as_bytes())
    };
    let processes = fs::read_dir("/proc")?.flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let passt = numbers.find(has).context("there is no passt")?;
    kill(Pid::from_raw(passt), Signal::SIGKILL)?;
    let mut events = Events::default();
    for kind in [EventKind::Disconnected, EventKind::Reconnected] {
        events.wait(run, DEADLINE, |event| event.event == kind)?;
    }
    ensure!(
        events.read(run)?.len() == 2,
        "another did not stay: {:?}",
        events.read(run)?
    );
    Ok(())
}

/// What reads the guest's frames for passt reaches nothing else; there is none where passt serves the queues.
fn relay_is_confined(run: &mut Run) -> Result<()> {
    let state = run.state(DEADLINE)?;
    for relay in state
        .processes
        .iter()
        .filter(|p| p.role == ProcessRole::NetNamespace)
    {
        let status = filtered(relay.pid)?;
        let has = |line: &str| status.lines().any(|have| have == line);
        ensure!(has("CapEff:\t0000000000000000"), "{status}");
        // Of a process that cannot be dumped only root sees the rest.
        if Uid::effective().is_root() {
            empty_root(relay.pid)?;
            let open = fs::read_dir(format!("/proc/{}/fd", relay.pid))?.count();
            ensure!(open == 5, "{open} descriptors are open");
        }
    }
    Ok(())
}

/// The process that a NIC's namespace depends on sees no path of the host's.
fn holder_sees_no_path(run: &mut Run) -> Result<()> {
    let state = run.state(DEADLINE)?;
    let mut holders = state
        .processes
        .iter()
        .filter(|p| p.role == ProcessRole::NetNamespace);
    let holder = holders.next().context("no holder in state.json")?.pid;
    // It does so once its TAP is on its way.
    wait_until("its root is empty", || Ok(empty_root(holder).is_ok()))
}

fn without_passt() -> Result<()> {
    Host::need_tun()?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.env("PATH", "/nowhere");
    let kernel = artifact(Artifact::TinyGuest)?;
    let flags = [format!("--kernel={}", kernel.display()), "--net=user".to_owned()];
    let mut run = Run::by(command, tempfile::tempdir()?, &flags)?;
    let status = run.wait(DEADLINE)?;
    let said = run.process.stderr()?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(
        said.contains("passt is not installed") && said.contains("apt install passt"),
        "{said}"
    );
    Ok(())
}

/// Holds a network namespace with a bridge.
pub(crate) fn with_bridge(name: &str) -> Result<Process> {
    let mut host = Command::new("unshare");
    let make =
        format!("ip link add {name} type bridge && ip link set {name} up && echo up && exec sleep 1000");
    host.args(["-n", "sh", "-c", &make]).stdout(Stdio::piped());
    let mut host = Process::start(host)?;
    let mut console = integration_tests::tiny::Console::new(host.child().stdout.take().context("stdout")?);
    console.wait_line("up", DEADLINE)?;
    Ok(host)
}

/// A TAP joins the bridge, and leaves it with the VM, however that ends.
fn bridge() -> Result<()> {
    Host::need_tun()?;
    if !Uid::effective().is_root() {
        bail!(Skip("a bridge of the host needs root".to_owned()));
    }
    let host = with_bridge("wire")?;
    let pid = host.pid();
    let inside = |program: &Path| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{pid}/ns/net")).arg(program);
        command
    };
    let ports = || -> Result<usize> {
        let mut command = inside(Path::new("ip"));
        let output = command.args(["-o", "link", "show", "master", "wire"]).output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output
            .stdout
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .count())
    };
    let kernel = artifact(Artifact::TinyGuest)?;
    let flags = [
        format!("--kernel={}", kernel.display()),
        "--cmdline=scenario=hlt".to_owned(),
        "--net=bridge=wire".to_owned(),
        "--net=bridge=wire,mtu=9000".to_owned(),
    ];
    let mut look = inside(artifact(Artifact::Bulkhead)?);
    let looked = look.args(["run", "--dry-run"]).args(&flags).output()?;
    ensure!(looked.status.success(), "{looked:?}");
    no_interface_since(&inside)?;
    let command = inside(artifact(Artifact::Bulkhead)?);
    let mut run = Run::by(command, tempfile::tempdir()?, &flags)?;
    run.console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| run.process.stderr().unwrap_or_default())?;
    ensure!(ports()? == 2, "{} TAPs on the bridge", ports()?);
    // The host's end of a link that is down has no carrier.
    let link = |order: &str| -> Result<()> {
        let output = run.verb("link", &["net1", order])?.output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    let carriers = || -> Result<usize> {
        let mut command = inside(Path::new("ip"));
        let output = command.args(["-o", "link", "show", "master", "wire"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().filter(|line| !line.contains("NO-CARRIER")).count())
    };
    ensure!(carriers()? == 2, "a link is down from the start");
    link("down")?;
    wait_until("a link goes down", || Ok(carriers()? == 1))?;
    link("up")?;
    wait_until("the link comes up", || Ok(carriers()? == 2))?;
    run.process.signal(Signal::SIGKILL)?;
    wait_until("the TAPs go with the VM", || Ok(ports()? == 0))
}

/// The kernel counts interfaces, those too that are gone: what is made now is the next one after the bridge.
fn no_interface_since(inside: &impl Fn(&Path) -> Command) -> Result<()> {
    let ip = |words: &[&str]| -> Result<String> {
        let output = inside(Path::new("ip")).args(words).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let number = |name| -> Result<u32> {
        let line = ip(&["-o", "link", "show", name])?;
        let number = line.split(':').next().context("no number")?;
        number.parse().with_context(|| line.clone())
    };
    ip(&["link", "add", "next", "type", "bridge"])?;
    let (wire, next) = (number("wire")?, number("next")?);
    ip(&["link", "del", "next"])?;
    ensure!(next == wire + 1, "{} interfaces were made", next - wire - 1);
    Ok(())
}

/// A rate of 1000 packets a second, after a burst of 100, holds within a tenth here; the bucket's
/// own tests hold it to 2 %.
fn limits() -> Result<()> {
    Host::need_tun()?;
    let name = segment("limits");
    let mut answering = started(
        "scenario=net-echo packets=1100",
        &format!("isolated={name}"),
        "ready=1",
    )?;
    let start = Instant::now();
    let net = format!("{ASKING},isolated={name},transmit-packets=1000,transmit-packets-burst=100");
    let mut asking = Run::tiny("scenario=net packets=1100 depth=64", &[format!("--net={net}")])?;
    let mut seen = String::new();
    wait_until("frames are counted", || {
        let output = answering.verb("metrics", &["net0"])?.output()?;
        seen = String::from_utf8_lossy(&output.stdout).into_owned();
        let count = |of: &str| -> Option<u64> {
            let line = seen.lines().find(|line| line.contains(of))?;
            line.rsplit(' ').next()?.parse().ok()
        };
        let of = "vm=\"test\",device=\"net0\",direction";
        let frames = |direction| count(&format!("bulkhead_net_frames_total{{{of}=\"{direction}\"}}"));
        // Each is answered, and has the least length.
        let bytes = count(&format!("bulkhead_net_bytes_total{{{of}=\"receive\"}}"));
        Ok(frames("transmit") > Some(0) && bytes >= frames("receive").map(|n| n * 60))
    })
    .with_context(|| seen.clone())?;
    expect_ok(&mut asking)?;
    expect_ok(&mut answering)?;
    let took = start.elapsed();
    ensure!(
        took >= Duration::from_millis(980),
        "1000 packets beyond the burst took {took:?}"
    );
    Ok(())
}
