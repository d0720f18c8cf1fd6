//! Linux guests on networks that need no root: a private segment, and the host's own sockets by passt.

use crate::boots::{BOOT, GRACE};
use crate::default_kernel;
use anyhow::{Context, Result, bail, ensure};
use integration_tests::host::Host;
use integration_tests::lent::{Lent, NOBODY};
use integration_tests::linux::{Launch, Ran, Work};
use integration_tests::mounts::show_instead;
use integration_tests::process::ip;
use integration_tests::suite::{Skip, test_within};
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;
use vm_spec::net::NetSpec;

/// The host's servers (RFC 5737 sets these addresses aside).
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
const PAGE_PORT: u16 = 8080;
/// The host's port that leads to the guest's port 80.
const PUBLISHED: u16 = 18080;
const PAGE: &str = "a page by its server's name";
const QUESTION: &str = "what is published?";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(
            3 * (BOOT + GRACE),
            "two guests on one segment, and one on another",
            segments,
        ),
        test_within(
            BOOT + GRACE,
            "DHCP, a name, its page and a published port without root",
            || {
                Host::need_linux_kvm()?;
                Host::need_passt()?;
                if !Uid::effective().is_root() {
                    bail!(Skip("only root can make namespaces for a thread".to_owned()));
                }
                let ran = thread::spawn(outbound).join();
                check(&ran.map_err(|_| anyhow::anyhow!("the guest's other side panicked"))??)
            },
        ),
    ]
}

/// The first serves until the second has come; the third, on another segment, comes before it.
fn segments() -> Result<()> {
    Host::need_linux_kvm()?;
    let (lab, other) = (format!("lab-{}", std::process::id()), "elsewhere".to_owned());
    let run = |segment: &str, words, deadline, on_report: &mut dyn FnMut(&str) -> Result<()>| {
        let launch = Launch {
            nets: vec![NetSpec {
                isolated: Some(segment.to_owned()),
                ..NetSpec::default()
            }],
            words,
            ..Launch::small(deadline)
        };
        let ran = Work::new(default_kernel()?)?.run_with(&launch, on_report)?;
        ran.expect_power_off()?;
        Ok::<Ran, anyhow::Error>(ran)
    };
    let mut others = None;
    let server = run(&lab, "guest.segment=1", 3 * BOOT, &mut |report| {
        if report == "serves" {
            let stranger = run(&other, "guest.segment=3", BOOT, &mut |_| Ok(()))?;
            others = Some((stranger, run(&lab, "guest.segment=2", BOOT, &mut |_| Ok(()))?));
        }
        Ok(())
    })?;
    let (stranger, client) = others.context("the first guest did not serve")?;
    ensure!(client.report("icmp")? == "3", "{:?}", client.reports);
    ensure!(
        client.report("sent")? == server.report("received")?,
        "{:?} and {:?}",
        client.reports,
        server.reports
    );
    ensure!(
        stranger.report("icmp")? == "0" && stranger.report("sent").is_err(),
        "reached from another segment: {:?}",
        stranger.reports
    );
    Ok(())
}

/// Boots a guest of a user who owns nothing, in this thread's network namespace, whose only way out and
/// whose name server are made here.
fn outbound() -> Result<Ran> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    for command in [
        "link set lo up".to_owned(),
        format!("address add {HOST}/32 dev lo"),
        "tuntap add out0 mode tap".to_owned(),
        "link set out0 up".to_owned(),
        "address add 198.51.100.2/24 dev out0".to_owned(),
        "route add default via 198.51.100.1".to_owned(),
    ] {
        ip(&command)?;
    }
    let mut work = Work::new(default_kernel()?)?;
    let names = work.path().join("resolv.conf");
    std::fs::write(&names, format!("nameserver {HOST}\n"))?;
    show_instead(&[(&names, "/etc/resolv.conf")])?;
    let socket = UdpSocket::bind((HOST, 53))?;
    thread::spawn(move || name_host(&socket));
    let listener = TcpListener::bind((HOST, PAGE_PORT))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            // A client that has gone needs no page.
            let _ = stream.write_all(PAGE.as_bytes());
        }
    });
    let _lent = Lent::to(NOBODY)?;
    work.give_to(NOBODY)?;
    let launch = Launch {
        nets: vec![NetSpec {
            user: true,
            publish: vec![format!("127.0.0.1:{PUBLISHED}:80")],
            ..NetSpec::default()
        }],
        user: Some(NOBODY),
        words: "guest.outbound=1",
        ..Launch::small(BOOT)
    };
    work.run_with(&launch, &mut |report| match report {
        "serves" => ask(),
        _ => Ok(()),
    })
}

/// Asks the guest through its published port.
fn ask() -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", PUBLISHED))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(QUESTION.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.trim() == "the guest", "{answer:?}");
    Ok(())
}

/// Answers questions for addresses of any name with [`HOST`], others with nothing (RFC 1035 section 4).
fn name_host(socket: &UdpSocket) -> Result<()> {
    const HEADER: usize = 12;
    let mut buffer = [0; 512];
    loop {
        let (length, client) = socket.recv_from(&mut buffer)?;
        let query = &buffer[..length];
        let name = query.get(HEADER..).context("a short query")?;
        let end = name
            .iter()
            .position(|byte| *byte == 0)
            .context("an endless name")?;
        let question = name.get(..end + 5).context("a short question")?;
        let address = question[end + 1..] == [0, 1, 0, 1];
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(address), 0, 0, 0, 0]);
        answer.extend(question);
        if address {
            // The name at offset 12, type A, class IN, 60 s, 4 bytes.
            answer.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(HOST.octets());
        }
        socket.send_to(&answer, client)?;
    }
}

fn check(ran: &Ran) -> Result<()> {
    ran.expect_power_off()?;
    let host = HOST.to_string();
    for (subject, wanted) in [("name", host.as_str()), ("page", PAGE), ("published", QUESTION)] {
        ensure!(
            ran.report(subject)? == wanted,
            "{subject}: {}\n{}",
            ran.console,
            ran.stderr
        );
    }
    Ok(())
}
