//! A Linux guest's traffic of every kind, over four pairs of queues and long frames.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Context, Result, bail, ensure};
use integration_tests::artifacts::Artifact;
use integration_tests::host::Host;
use integration_tests::linux::{Launch, Ran, Work};
use integration_tests::process::ip;
use integration_tests::suite::{Skip, artifact, full, test_within};
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use vm_spec::net::NetSpec;

const TAP: &str = "wire0";
const ECHO: u16 = 7000;
/// TFTP (RFC 1350).
const TFTP: u16 = 69;
/// Four virtual processors that all have work share an emulated one.
const LASTS: Duration = Duration::from_secs(2 * BOOT.as_secs());
/// What of the guest's four pairs is counted.
const PAIRS: u16 = 4;
/// Both are larger than what any pair sees without traffic of its own: neighbours, and nothing else.
const INTERRUPTS: u64 = 5;

pub(crate) fn tests() -> Vec<Trial> {
    vec![test_within(
        LASTS + GRACE,
        "TCP, UDP, ICMP, IPv6, frames of 9000 bytes, four pairs of queues, a link that goes and comes",
        || {
            Host::need_linux_kvm()?;
            if !Uid::effective().is_root() {
                bail!(Skip(
                    "only root can make a network namespace for a thread".to_owned()
                ));
            }
            let ran = thread::spawn(traffic).join();
            check(&ran.map_err(|_| anyhow::anyhow!("the guest's other side panicked"))??)
        },
    )]
}

/// Boots the guest in this thread's network namespace, beside what it talks to.
fn traffic() -> Result<Ran> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    for command in [
        "link set lo up".to_owned(),
        format!("tuntap add {TAP} mode tap vnet_hdr multi_queue"),
        format!("link set {TAP} mtu 9000 up"),
        format!("address add 10.0.2.2/24 dev {TAP}"),
        format!("address add fd00::2/64 dev {TAP} nodad"),
    ] {
        ip(&command)?;
    }
    let listener = TcpListener::bind(("::", ECHO))?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || echo(stream));
        }
    });
    let socket = UdpSocket::bind(("0.0.0.0", TFTP))?;
    thread::spawn(move || keep_file(&socket));
    let work = Work::new(default_kernel()?)?;
    let launch = Launch {
        cpus: PAIRS as u8,
        memory_mib: 256,
        nets: vec![NetSpec {
            tap: Some(TAP.to_owned()),
            queues: Some(PAIRS),
            mtu: Some(9000),
            ip: vec!["10.0.2.15".to_owned(), "fd00::15".to_owned()],
            ..NetSpec::default()
        }],
        // MiB of each transfer.
        words: if full() {
            "guest.traffic=4"
        } else {
            "guest.traffic=1"
        },
        ..Launch::small(LASTS)
    };
    work.run_with(&launch, &mut |report| match report {
        "ready for the link to go" => link(&work, "down"),
        "carrier 0" => link(&work, "up"),
        _ => Ok(()),
    })
}

fn link(work: &Work, order: &str) -> Result<()> {
    let names = std::fs::read_dir(work.path().join("bulkhead"))?;
    let name = names.map_while(Result::ok).next().context("no run-time folder")?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.arg("link").arg(name.file_name()).args(["net0", order]);
    let output = command.env("XDG_RUNTIME_DIR", work.path()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "bulkhead link net0 {order}: {said}");
    Ok(())
}

fn check(ran: &Ran) -> Result<()> {
    ran.expect_power_off()?;
    for report in [
        "mtu 9000",
        "icmp 5",
        "icmp6 5",
        "tcp 1",
        "tcp 2",
        "tcp 4",
        "tcp 8",
        "tcp6 f",
        "udp 1000000",
        "carrier 0",
        "carrier 1",
        "back 5",
    ] {
        ensure!(
            ran.reports.iter().any(|line| line == report),
            "the guest did not report '{report}': {}\n{}",
            ran.console,
            ran.stderr
        );
    }
    for pair in 0..PAIRS {
        let interrupts: u64 = ran.report(&format!("input.{pair}"))?.parse()?;
        ensure!(
            interrupts >= INTERRUPTS,
            "pair {pair} received nothing: {:?}",
            ran.reports
        );
    }
    Ok(())
}

/// Sends back what it reads, at once. It never stops reading: its client reads nothing while it writes, and each would
/// wait for the other once what lies between them is full.
fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut back = stream.try_clone()?;
    let (sender, parts) = mpsc::channel::<Vec<u8>>();
    let writer = thread::spawn(move || {
        parts.iter().try_for_each(|part| back.write_all(&part))?;
        back.shutdown(Shutdown::Write)
    });
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = stream.read(&mut buffer)?;
        // The writer is gone: it says why.
        if length == 0 || sender.send(buffer[..length].to_vec()).is_err() {
            break;
        }
    }
    drop(sender);
    writer.join().unwrap_or(Ok(()))
}

/// A TFTP server (RFC 1350, block size by RFC 2348) for one file at a time, which it keeps in memory.
fn keep_file(socket: &UdpSocket) -> Result<()> {
    const READ: u8 = 1;
    const WRITE: u8 = 2;
    let mut file = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, client) = socket.recv_from(&mut buffer)?;
        let request = buffer[..length].to_vec();
        // The transfer has a port of its own.
        let transfer = UdpSocket::bind(("0.0.0.0", 0))?;
        transfer.connect(client)?;
        transfer.set_read_timeout(Some(Duration::from_secs(10)))?;
        match request.get(1) {
            Some(&READ) => send_file(&transfer, &file, block_size(&request))?,
            Some(&WRITE) => file = receive_file(&transfer, block_size(&request))?,
            _ => bail!("no TFTP request"),
        }
    }
}

/// The value of `blksize` among a request's strings.
fn block_size(request: &[u8]) -> usize {
    let mut words = request[2..].split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words.find(|word| word == "blksize");
    words.next().and_then(|word| word.parse().ok()).unwrap_or(512)
}

/// Opcode 6: the options that are agreed to.
fn agreed(size: usize) -> Vec<u8> {
    [b"\0\x06blksize\0", size.to_string().as_bytes(), b"\0"].concat()
}

fn send_file(transfer: &UdpSocket, file: &[u8], size: usize) -> Result<()> {
    let mut answer = [0; 4];
    transfer.send(&agreed(size))?;
    transfer.recv(&mut answer)?;
    // The last block is a short one, if need be an empty one.
    for block in 0..=file.len() / size {
        let data = &file[block * size..file.len().min((block + 1) * size)];
        let number = (block as u16 + 1).to_be_bytes();
        transfer.send(&[&[0, 3], &number[..], data].concat())?;
        transfer.recv(&mut answer)?;
        ensure!(
            answer[..2] == [0, 4] && answer[2..] == number,
            "TFTP: {answer:?} for block {block}"
        );
    }
    Ok(())
}

fn receive_file(transfer: &UdpSocket, size: usize) -> Result<Vec<u8>> {
    let (mut file, mut buffer) = (Vec::new(), vec![0; 4 + size]);
    transfer.send(&agreed(size))?;
    loop {
        let length = transfer.recv(&mut buffer)?;
        ensure!(length >= 4 && buffer[..2] == [0, 3], "TFTP: no data");
        file.extend_from_slice(&buffer[4..length]);
        transfer.send(&[0, 4, buffer[2], buffer[3]])?;
        if length < 4 + size {
            return Ok(file);
        }
    }
}
