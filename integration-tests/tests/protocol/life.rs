//! Starts, ends and reconnects.

use crate::fixture::{BLOCK, Disk, Kind, check_blocks, has_input, read_block, write_block};
use anyhow::{Context, Result, ensure};
use guest_contract::holds;
use integration_tests::{
    frontend_harness::{BASE, BlockDriver, DEADLINE, Memory, Options, STATUS_OK, Session, protocol, request},
    process::{Process, connect, inherit_at},
    qemu_img::qemu_img,
    suite::{artifact, test},
};
use libtest_mimic::Trial;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::Signal,
    },
};
use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// A device process ends this soon after it was asked to.
const QUICK: Duration = Duration::from_secs(2);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("life::capabilities", capabilities),
        test("life::nobody_takes_what_is_printed", nobody_takes),
        test("life::reconnect", reconnect),
        test("life::socket_activation", socket_activation),
        test("life::socket_activation_by_what_is_no_listener", no_listener),
        test("life::sigterm", sigterm),
        test("life::sigterm_amid_a_message", sigterm_amid_a_message),
        test("life::sigterm_while_it_opens", sigterm_while_it_opens),
        test("life::unsealed_memory_is_refused_in_the_jail", unsealed),
        test("life::truncated_memory_ends_cleanly", truncated),
        test("life::wrong_format_is_named", wrong_format),
        test("life::reset_and_restart", reset),
        test("life::a_new_doorbell_is_heard", new_doorbell),
    ]
    .into_iter()
    .chain(Kind::OURS.into_iter().flat_map(|kind| {
        let name = |what: &str| format!("life::{}::{what}", kind.name());
        [
            test(name("a_stopped_ring_is_drained"), move || drained(kind)),
            test(name("memory_is_replaced_under_load"), move || new_memory(kind)),
            test(name("memory_goes_under_load"), move || lost_memory(kind)),
            test(name("memory_goes_and_comes"), move || replaced_memory(kind)),
        ]
    }))
    .collect()
}

fn listen(disk: &Disk) -> Result<(Process, std::path::PathBuf)> {
    let path = disk.folder.path().join("sock");
    let mut command = disk.command()?;
    command.arg(format!("--socket-path={}", path.display()));
    Ok((Process::start(command)?, path))
}

fn driver(socket: UnixStream) -> Result<BlockDriver> {
    Ok(BlockDriver::new(Session::start(socket, &Options::default())?))
}

/// QEMU's back-end conventions: JSON with the type, on stdout, and nothing else.
fn capabilities() -> Result<()> {
    use integration_tests::artifacts::Artifact::{VhostUserBlk, VhostUserNet};
    for (program, kind) in [(VhostUserBlk, "block"), (VhostUserNet, "net")] {
        // Other options are ignored, those that are not understood too.
        let output = Command::new(artifact(program)?)
            .args(["--nofds", "-x", "--print-capabilities", "--num-queues=none"])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        let value: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(value["type"] == kind, "type is {}", value["type"]);
    }
    Ok(())
}

/// A full disk is an error, a reader that has left is none; neither is a crash.
fn nobody_takes() -> Result<()> {
    use integration_tests::artifacts::Artifact::{VhostUserBlk, VhostUserNet};
    for program in [VhostUserBlk, VhostUserNet] {
        for flag in ["--help", "--version", "--print-capabilities"] {
            let (reader, gone) = nix::unistd::pipe()?;
            drop(reader);
            let full = File::options().write(true).open("/dev/full")?;
            for (out, code) in [(full.into(), 1), (gone, 0)] {
                let mut command = Command::new(artifact(program)?);
                command.arg(flag).stdout(Stdio::from(out));
                let mut process = Process::start(command)?;
                let (status, said) = (process.wait(DEADLINE)?, process.stderr()?);
                ensure!(status.code() == Some(code), "{flag}: {status}: {said}");
                ensure!(said.contains("standard output") == (code == 1), "{flag}: {said}");
            }
        }
    }
    Ok(())
}

fn reconnect() -> Result<()> {
    let disk = Disk::new(Kind::Qcow2)?;
    let (mut process, path) = listen(&disk)?;
    for round in 0..5 {
        let mut driver = driver(connect(&path, DEADLINE)?)?;
        if round > 0 {
            ensure!(
                holds(&driver.done(0, &read_block(round - 1))?, 9, round - 1),
                "round {round}"
            );
        }
        driver.done(0, &write_block(9, round))?;
        // Left with requests in flight, as a front end that was killed leaves.
        for block in 100..120 {
            driver.submit(0, &write_block(9, block))?;
        }
        driver.kick(0)?;
    }
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(QUICK)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(!path.exists(), "the socket is left behind");
    check_blocks(&disk.content()?, 9, 5)
}

/// As systemd starts a service for a socket of its own: descriptor 3, and who it is for.
fn activate(disk: &Disk, socket: OwnedFd) -> Result<Process> {
    let served = disk.command()?;
    let mut command = Command::new("sh");
    command
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
        .arg(served.get_program())
        .args(served.get_args());
    inherit_at(&mut command, socket, 3)?;
    Process::start(command)
}

/// The socket is served to one front end after another, and stays its owner's.
fn socket_activation() -> Result<()> {
    let disk = Disk::new(Kind::Qcow2)?;
    let path = disk.folder.path().join("sock");
    let listener = UnixListener::bind(&path)?;
    // A front end may come before there is a process.
    let first = UnixStream::connect(&path)?;
    let mut process = activate(&disk, listener.try_clone()?.into())?;
    driver(first)?.done(0, &write_block(9, 0))?;
    let mut second = driver(UnixStream::connect(&path)?)?;
    ensure!(
        holds(&second.done(0, &read_block(0))?, 9, 0),
        "the data is not there"
    );
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(QUICK)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    ensure!(path.exists(), "someone else's socket was removed");
    let third = UnixStream::connect(&path)?;
    let _process = activate(&disk, listener.into())?;
    ensure!(
        holds(&driver(third)?.done(0, &read_block(0))?, 9, 0),
        "the data is not there"
    );
    Ok(())
}

fn no_listener() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (connected, _peer) = UnixStream::pair()?;
    let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
    for socket in [
        connected.into(),
        udp.into(),
        tcp.into(),
        File::open("/dev/null")?.into(),
    ] {
        let mut process = activate(&disk, socket)?;
        let status = process.wait(QUICK)?;
        let said = process.stderr()?;
        ensure!(status.code() == Some(1), "{status}: {said}");
        ensure!(
            said.contains("LISTEN_FDS: cannot listen on descriptor 3: "),
            "{said}"
        );
    }
    Ok(())
}

fn sigterm() -> Result<()> {
    for kind in Kind::OURS {
        let disk = Disk::new(kind)?;
        let (mut process, mut driver) = disk.drive(&Options::default())?;
        for block in 0..64 {
            driver.done(0, &write_block(4, block))?;
        }
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(QUICK)?;
        ensure!(status.success(), "{status}: {}", process.stderr()?);
        check_blocks(&disk.content()?, 4, 64)?;
    }
    Ok(())
}

/// A front end that sends half a message and no more does not keep the process from ending.
fn sigterm_amid_a_message() -> Result<()> {
    for part in [&[1_u8, 0, 0, 0][..], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 7][..]] {
        let disk = Disk::new(Kind::Raw)?;
        let (mut process, mut driver) = disk.drive(&Options::default())?;
        driver.done(0, &write_block(4, 0))?;
        driver.session.connection.send_raw(part, &[])?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(QUICK)?;
        ensure!(status.success(), "{status}: {}", process.stderr()?);
        check_blocks(&disk.content()?, 4, 1)?;
    }
    Ok(())
}

/// A passphrase that does not come to its end keeps the image from being opened.
fn sigterm_while_it_opens() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let disk = Disk::new(Kind::Qcow2)?;
        let (reader, writer) = nix::unistd::pipe()?;
        nix::unistd::write(&writer, b"x")?;
        let mut command = disk.command()?;
        command.arg(format!(
            "--socket-path={}",
            disk.folder.path().join("sock").display()
        ));
        command.arg("--key-fd=5");
        inherit_at(&mut command, reader.try_clone()?, 5)?;
        let mut process = Process::start(command)?;
        let end = Instant::now() + DEADLINE;
        while has_input(&reader)? {
            ensure!(Instant::now() < end, "nobody reads the passphrase");
            ensure!(process.alive()?, "{}", process.stderr()?);
        }
        process.signal(signal)?;
        let status = process.wait(QUICK)?;
        ensure!(
            status.signal() == Some(signal as i32),
            "{status}: {}",
            process.stderr()?
        );
        drop(writer);
    }
    Ok(())
}

/// With `--fd`, as bulkhead starts it, a memfd that could shrink is refused.
fn unsealed() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, socket) = disk.start()?;
    let memory = Arc::new(Memory::unsealed(16 << 20)?);
    let result = Session::negotiate(socket, &Options::default(), memory);
    ensure!(result.is_err(), "an unsealed memfd was taken");
    drop(result);
    process.wait(DEADLINE)?;
    ensure!(
        process.stderr()?.contains("seal"),
        "stderr does not say why: {}",
        process.stderr()?
    );
    Ok(())
}

/// With `--socket-path` it is taken; when it shrinks the process ends by itself, in time.
fn truncated() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (mut process, path) = listen(&disk)?;
    let options = Options::default();
    let memory = Arc::new(Memory::unsealed(options.memory)?);
    let socket = connect(&path, DEADLINE)?;
    let mut session = Session::start_in(socket, &options, memory.clone())?;
    // Our own mapping must not be touched any more, so the last kick goes out first by hand.
    session.rings[0].offer(0)?;
    memory.truncate(0)?;
    session.rings[0].kick.write(1)?;
    let status = process.wait(DEADLINE)?;
    ensure!(!status.success(), "the process went on without memory");
    ensure!(
        process.stderr()?.contains("memory"),
        "stderr does not say why: {}",
        process.stderr()?
    );
    Ok(())
}

fn wrong_format() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let mut command = Command::new(artifact(integration_tests::artifacts::Artifact::VhostUserBlk)?);
    command.arg(format!("--blk-file={}", disk.path.display()));
    command.args(["--format=qcow2", "--fd=3"]);
    let (mut process, _socket) = Process::start_with_socket(command)?;
    let status = process.wait(DEADLINE)?;
    ensure!(!status.success(), "a raw file was served as qcow2");
    let message = process.stderr()?;
    ensure!(message.contains("qcow2"), "stderr names no format: {message}");
    Ok(())
}

/// A guest's reset: rings stopped, indices zeroed, device reset, and started again.
fn reset() -> Result<()> {
    let disk = Disk::new(Kind::Qcow2)?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    for round in 0..3 {
        for block in 0..40 {
            driver.done(0, &write_block(round, block))?;
        }
        let base = driver.session.stop_ring(0)?;
        ensure!(base == 40, "GET_VRING_BASE says {base}");
        driver.session.connection.tell(request::RESET_DEVICE, &[], &[])?;
        driver = BlockDriver::new(driver.session.restart(&Options::default())?);
    }
    ensure!(holds(&driver.done(0, &read_block(7))?, 2, 7), "data differs");
    drop(driver);
    let status = process.wait(DEADLINE).context("after the front end left")?;
    ensure!(status.success(), "{status}");
    let path = disk.path.to_str().context("temporary folder is not UTF-8")?;
    qemu_img(&["check", "-q", "-f", "qcow2", path]).map(drop)
}

/// SET_VRING_KICK while the ring runs, and what was rung before is not lost.
fn new_doorbell() -> Result<()> {
    let disk = Disk::new(Kind::Raw)?;
    let (_process, mut driver) = disk.drive(&Options::default())?;
    for round in 0..20 {
        driver.submit(0, &write_block(6, round))?;
        driver.kick(0)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        driver.session.rings[0].kick = EventFd::from_flags(flags)?;
        let kick = driver.session.rings[0].kick.as_fd();
        let connection = &mut driver.session.connection;
        connection.tell(request::SET_VRING_KICK, &0_u64.to_le_bytes(), &[kick])?;
        let status = driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
        ensure!(
            holds(&driver.done(0, &read_block(round))?, 6, round),
            "data differs"
        );
    }
    Ok(())
}

/// Requests of [`under_load`].
const LOAD: u64 = 40;

/// A driver with [`LOAD`] writes under way, and no more memory messages than SET_MEM_TABLE.
fn under_load(disk: &Disk) -> Result<(Process, BlockDriver)> {
    let defaults = Options::default();
    let options = Options {
        protocol: defaults.protocol & !protocol::CONFIGURE_MEM_SLOTS,
        ..defaults
    };
    let (process, mut driver) = disk.drive(&options)?;
    for block in 0..LOAD {
        driver.submit(0, &write_block(8, block))?;
    }
    driver.kick(0)?;
    Ok((process, driver))
}

/// What the ring was stopped at is done, and nothing behind it is.
fn drained(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = under_load(&disk)?;
    let base = driver.session.stop_ring(0)?;
    let [_, _, used] = driver.session.rings[0].parts();
    let published = driver.session.memory.observe(used + 2)?;
    ensure!(u32::from(published) == base, "{published} are done of {base}");
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    let content = disk.content()?;
    check_blocks(&content, 8, base.into())?;
    let rest = &content[base as usize * BLOCK..];
    ensure!(rest.iter().all(|byte| *byte == 0), "more than {base} are done");
    Ok(())
}

/// A table with the same memory: what is under way is finished, and the ring goes on.
fn new_memory(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = under_load(&disk)?;
    let memory = driver.session.memory.clone();
    let table = [&1_u64.to_le_bytes()[..], &memory.region()].concat();
    let connection = &mut driver.session.connection;
    connection.tell(request::SET_MEM_TABLE, &table, &[memory.fd()])?;
    for _ in 0..LOAD {
        let status = driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
    }
    driver.done(0, &write_block(8, LOAD))?;
    drop(driver);
    process.wait(DEADLINE)?;
    check_blocks(&disk.content()?, 8, LOAD + 1)
}

/// A region that is replaced while the ring runs: taken out and put back, nobody is told of an error.
fn replaced_memory(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = disk.drive(&Options::default())?;
    driver.done(0, &write_block(8, 0))?;
    let memory = driver.session.memory.clone();
    let slot = [&0_u64.to_le_bytes()[..], &memory.region()].concat();
    for block in 1..LOAD {
        let connection = &mut driver.session.connection;
        connection.tell(request::REM_MEM_REG, &slot, &[])?;
        connection.tell(request::ADD_MEM_REG, &slot, &[memory.fd()])?;
        driver.done(0, &write_block(8, block))?;
    }
    ensure!(
        !is_signalled(&driver, PollTimeout::ZERO)?,
        "the queue was marked as broken"
    );
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    check_blocks(&disk.content()?, 8, LOAD)
}

/// A table without the ring's memory: what is under way ends in the old one, and a driver that wants more is told;
/// with the memory back in the table, it is served.
fn lost_memory(kind: Kind) -> Result<()> {
    let disk = Disk::new(kind)?;
    let (mut process, mut driver) = under_load(&disk)?;
    let other = Memory::new(1 << 20)?;
    // Far from the rings, for the guest and for the front end.
    let place = BASE + (1 << 40);
    let table = [1, place, other.size(), place, 0].map(u64::to_le_bytes).concat();
    let connection = &mut driver.session.connection;
    connection.tell(request::SET_MEM_TABLE, &table, &[other.fd()])?;
    driver.submit(0, &write_block(8, LOAD))?;
    driver.session.rings[0].force_kick()?;
    ensure!(
        is_signalled(&driver, PollTimeout::try_from(DEADLINE)?)?,
        "the queue was not marked as broken"
    );
    ensure!(process.alive()?, "the process has gone: {}", process.stderr()?);
    let memory = driver.session.memory.clone();
    let table = [&1_u64.to_le_bytes()[..], &memory.region()].concat();
    let connection = &mut driver.session.connection;
    connection.tell(request::SET_MEM_TABLE, &table, &[memory.fd()])?;
    for _ in 0..=LOAD {
        let status = driver.complete(0)?.status;
        ensure!(status == STATUS_OK, "status {status}");
    }
    drop(driver);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    check_blocks(&disk.content()?, 8, LOAD + 1)
}

/// Whether the back end says that queue 0 is broken.
fn is_signalled(driver: &BlockDriver, timeout: PollTimeout) -> Result<bool> {
    let error = &driver.session.rings[0].error;
    Ok(poll(&mut [PollFd::new(error.as_fd(), PollFlags::POLLIN)], timeout)? > 0)
}
