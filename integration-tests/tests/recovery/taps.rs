//! TAPs of the host's that vanish under a guest, and what comes in their place.

use crate::{storm::DEADLINE, trouble::need_root, victim::Victim};
use anyhow::{Context, Result, bail, ensure};
use guest_contract::{FRAME_LENGTH, GUEST_FRAMES, HOST_FRAMES, frame_number, write_frame};
use integration_tests::{
    artifacts::Artifact,
    demo::peer::Peer,
    host::Host,
    process::{inherit_at, ip},
    suite::{Skip, artifact, test_within},
    tap,
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsFd,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use vm_spec::{events::EventKind, run_state::ProcessRole};

const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_within(LIMIT, "taps::one_by_name_returns", named_tap),
        test_within(
            LIMIT,
            "taps::one_of_several_queues_serves_one_pair",
            several_queues,
        ),
        test_within(LIMIT, "taps::one_by_descriptor_returns", inherited_tap),
        test_within(
            LIMIT,
            "taps::one_of_another_network_is_not_mistaken",
            tap_of_elsewhere,
        ),
        test_within(LIMIT, "taps::one_on_a_bridge_is_made_again", bridged_tap),
        test_within(LIMIT, "taps::a_process_needs_none", no_tap_for_long),
        test_within(LIMIT, "taps::one_is_lost_with_its_process", both_at_once),
        test_within(LIMIT, "taps::a_process_that_is_stopped_is_replaced", stopped),
        test_within(
            LIMIT,
            "taps::a_bridge_is_lost_with_its_process",
            bridge_and_process,
        ),
    ]
}

/// An interface of the host's, made by another.
struct Interface(String);

impl Interface {
    fn make(name: &str) -> Result<Self> {
        Self::with(name, "vnet_hdr")
    }

    fn with(name: &str, flags: &str) -> Result<Self> {
        ip(&format!("tuntap add {name} mode tap {flags}"))?;
        let interface = Self(name.to_owned());
        ip(&format!("link set {name} up"))?;
        Ok(interface)
    }

    /// Whether a process has it open.
    fn is_open(&self) -> bool {
        let carrier = fs::read_to_string(format!("/sys/class/net/{}/carrier", self.0));
        carrier.is_ok_and(|text| text.trim() == "1")
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.0));
    }
}

/// A guest whose NIC is on this, once it runs.
struct OnTap {
    run: Run,
    victim: Victim,
}

impl OnTap {
    fn start(launcher: Command, net: &str) -> Result<Self> {
        let kernel = artifact(Artifact::TinyGuest)?.display();
        let flags = [
            format!("--kernel={kernel}"),
            "--memory=64M".to_owned(),
            "--cmdline=scenario=net-echo packets=1".to_owned(),
            format!("--net={net}"),
            "--power-off-grace=1".to_owned(),
        ];
        let mut run = Run::by(launcher, tempfile::tempdir()?, &flags)?;
        run.console
            .wait_line("ready=1", DEADLINE)
            .with_context(|| run.process.stderr().unwrap_or_default())?;
        Ok(Self {
            run,
            victim: Victim::new(ProcessRole::Net),
        })
    }

    /// What its process finds of its TAP, it has no time to tell.
    fn die_with(&mut self, take_away: impl FnOnce() -> Result<()>) -> Result<()> {
        self.strike(Signal::SIGSTOP)?;
        take_away()?;
        self.victim.forget();
        self.strike(Signal::SIGKILL)
    }

    fn strike(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.victim.strike(&mut self.run, signal, DEADLINE)?, "it ended");
        Ok(())
    }

    /// Frames go both ways; it is all that the guest waits for.
    fn echoes_to(mut self, wire: &Wire) -> Result<()> {
        wire.ask(DEADLINE)
            .with_context(|| self.run.process.stderr().unwrap_or_default())?;
        self.run.wait(DEADLINE)?;
        self.run.console.expect_ok()
    }

    fn wait(&mut self, kind: EventKind, time: u64) -> Result<()> {
        let waited = self.victim.wait_count(&self.run, kind, time, DEADLINE);
        waited.with_context(|| self.run.process.stderr().unwrap_or_default())?;
        Ok(())
    }

    /// The device's process had no part in it.
    fn expect_none_died(&mut self) -> Result<()> {
        let events = self.victim.events(&self.run)?;
        let died = events.iter().find(|event| event.event == EventKind::Died);
        ensure!(died.is_none(), "{died:?}");
        Ok(())
    }
}

/// A TAP of the test's own, beside what is on a bridge.
struct Wire {
    bridge: Interface,
    tap: File,
}

impl Wire {
    fn on(bridge: Interface) -> Result<Self> {
        let own = format!("{}w", bridge.0);
        let tap = File::from(tap::open(&own)?);
        ip(&format!("link set {own} master {} up", bridge.0))?;
        Ok(Self { bridge, tap })
    }

    fn connect(&self, interface: &Interface) -> Result<()> {
        ip(&format!("link set {} master {}", interface.0, self.bridge.0))
    }

    /// Asks whoever there is, until one answers.
    fn ask(&self, deadline: Duration) -> Result<()> {
        /// `struct virtio_net_hdr`.
        const HEADER: usize = 10;
        let end = Instant::now() + deadline;
        let mut frame = [0; FRAME_LENGTH];
        write_frame(&mut frame, [0xff; 6], [2, 0, 0, 0, 0, 1], GUEST_FRAMES, 0);
        let question = [&[0; HEADER], &frame[..]].concat();
        let mut answer = [0; 2048];
        while Instant::now() < end {
            (&self.tap).write_all(&question)?;
            let asked = Instant::now();
            // A bridge drops what comes before the carrier of a new port has been seen.
            while let Some(left) = Duration::from_millis(100).checked_sub(asked.elapsed()) {
                let mut ready = [PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
                if poll(&mut ready, PollTimeout::try_from(left)?)? == 0 {
                    break;
                }
                let length = (&self.tap).read(&mut answer)?;
                let frame = answer.get(HEADER..length).unwrap_or_default();
                if frame_number(frame, HOST_FRAMES).is_some() {
                    return Ok(());
                }
            }
        }
        bail!("no answer")
    }
}

fn bridge(letter: char) -> Result<Interface> {
    let bridge = name(letter);
    ip(&format!("link add {bridge} type bridge"))
        .map_err(|error| Skip(format!("no bridge can be made: {error:#}")))?;
    let bridge = Interface(bridge);
    ip(&format!("link set {} up", bridge.0))?;
    Ok(bridge)
}

/// The only interface on it.
fn port_of(bridge: &Interface) -> Result<String> {
    let mut ports = fs::read_dir(format!("/sys/class/net/{}/brif", bridge.0))?;
    let port = ports.next().context("the bridge has no port")??;
    ensure!(ports.next().is_none(), "the bridge has two ports");
    Ok(port.file_name().to_string_lossy().into_owned())
}

/// An interface's name that no other test has.
fn name(letter: char) -> String {
    format!("bh{letter}{}", std::process::id())
}

/// It goes and comes, three times.
fn goes_and_comes(mut interface: Interface, mut guest: OnTap) -> Result<()> {
    let name = interface.0.clone();
    for time in 1..=3 {
        drop(interface);
        guest.wait(EventKind::TapLost, time)?;
        interface = Interface::make(&name)?;
        guest.wait(EventKind::TapBack, time)?;
        guest.wait(EventKind::Restarted, time)?;
        ensure!(
            interface.is_open(),
            "nobody has the TAP: {}",
            guest.run.process.stderr()?
        );
    }
    guest.expect_none_died()
}

fn named_tap() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let interface = Interface::make(&name('n'))?;
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let guest = OnTap::start(launcher, &format!("tap={}", interface.0))?;
    goes_and_comes(interface, guest)
}

/// A process that a signal stops is found, killed and replaced; frames go both ways then.
fn stopped() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let wire = Wire::on(bridge('s')?)?;
    let interface = Interface::make(&name('h'))?;
    wire.connect(&interface)?;
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let mut guest = OnTap::start(launcher, &format!("tap={}", interface.0))?;
    guest.strike(Signal::SIGSTOP)?;
    guest.wait(EventKind::Hung, 1)?;
    guest.wait(EventKind::Restarted, 1)?;
    guest.expect_none_died()?;
    guest.echoes_to(&wire)
}

/// Whoever made the TAP did not know how many pairs of queues would be wanted.
fn several_queues() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let interface = Interface::with(&name('m'), "vnet_hdr multi_queue")?;
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let guest = OnTap::start(launcher, &format!("tap={}", interface.0))?;
    ensure!(interface.is_open(), "nobody has the TAP");
    drop(guest);
    Ok(())
}

/// The descriptor that launchers inherit.
const FD: i32 = 9;

fn inherited_tap() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let interface = Interface::make(&name('i'))?;
    let mut launcher = Command::new(artifact(Artifact::Bulkhead)?);
    inherit_at(&mut launcher, tap::open(&interface.0)?, FD)?;
    let guest = OnTap::start(launcher, &format!("tap-fd={FD}"))?;
    goes_and_comes(interface, guest)
}

/// An interface that has the name of the lost one, in another network, is not taken for it.
fn tap_of_elsewhere() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let peer = Peer::start("")?;
    let theirs = "tap0";
    let ours = Interface::make(theirs)?;
    let mut launcher = Command::new(artifact(Artifact::Bulkhead)?);
    inherit_at(&mut launcher, peer.tap.try_clone()?, FD)?;
    let mut guest = OnTap::start(launcher, &format!("tap-fd={FD}"))?;
    let deleted = Command::new("nsenter")
        .arg(format!("--target={}", peer.pid()))
        .args([
            "--user",
            "--net",
            "--preserve-credentials",
            "ip",
            "link",
            "delete",
            theirs,
        ])
        .status()?;
    ensure!(deleted.success(), "{deleted}");
    guest.wait(EventKind::TapLost, 1)?;
    // What can be opened is opened at once.
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        ensure!(!ours.is_open(), "the other network's interface was taken");
        thread::sleep(Duration::from_millis(10));
    }
    let events = guest.victim.events(&guest.run)?;
    let back = events.iter().find(|event| event.event == EventKind::TapBack);
    ensure!(back.is_none(), "{back:?}");
    Ok(())
}

/// The launcher's own TAP on a bridge: the next one is on it too.
fn bridged_tap() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let bridge = bridge('b')?;
    ip(&format!("link set {} mtu 9000", bridge.0))?;
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let mut guest = OnTap::start(launcher, &format!("bridge={}", bridge.0))?;
    for time in 1..=3 {
        ip(&format!("link delete {}", port_of(&bridge)?))?;
        for kind in [EventKind::TapLost, EventKind::TapBack, EventKind::Restarted] {
            guest.wait(kind, time)?;
        }
    }
    let port = Interface(port_of(&bridge)?);
    let of = |what: &str| fs::read_to_string(format!("/sys/class/net/{}/{what}", port.0));
    // A bridge without an address and an MTU of its own takes the lowest of its ports.
    ensure!(of("mtu")?.trim() == "9000", "the bridge's MTU is lowered");
    ensure!(
        of("address")?.starts_with("fe:"),
        "the bridge's address may change"
    );
    ensure!(port.is_open(), "nobody has {}", port.0);
    guest.expect_none_died()?;
    guest.run.process.signal(Signal::SIGTERM)?;
    guest.run.wait(DEADLINE)?;
    ensure!(
        !Path::new("/sys/class/net").join(&port.0).exists(),
        "{} is left behind",
        port.0
    );
    Ok(())
}

/// While there is none, processes die and are replaced by another build.
fn no_tap_for_long() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let wire = Wire::on(bridge('c')?)?;
    let interface = Interface::make(&name('k'))?;
    let tap = interface.0.clone();
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let mut guest = OnTap::start(launcher, &format!("tap={tap}"))?;
    drop(interface);
    guest.wait(EventKind::TapLost, 1)?;
    for time in 1..=3 {
        guest.strike(Signal::SIGKILL)?;
        guest.wait(EventKind::Restarted, time)?;
    }
    let mut upgrade = guest.run.verb("upgrade", &["net0", "--binary"])?;
    let output = upgrade.arg(artifact(Artifact::VhostUserNet)?).output()?;
    ensure!(output.status.success(), "{output:?}");
    guest.wait(EventKind::Upgraded, 1)?;
    let interface = Interface::make(&tap)?;
    wire.connect(&interface)?;
    guest.wait(EventKind::TapBack, 1)?;
    guest.wait(EventKind::Restarted, 4)?;
    let lost = guest.victim.events(&guest.run)?;
    let lost = lost.iter().filter(|event| event.event == EventKind::TapLost);
    ensure!(lost.count() == 1, "one TAP was lost");
    guest.echoes_to(&wire)
}

fn both_at_once() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let wire = Wire::on(bridge('d')?)?;
    let interface = Interface::make(&name('a'))?;
    let tap = interface.0.clone();
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let mut guest = OnTap::start(launcher, &format!("tap={tap}"))?;
    guest.die_with(|| {
        drop(interface);
        Ok(())
    })?;
    guest.wait(EventKind::TapLost, 1)?;
    guest.wait(EventKind::Restarted, 1)?;
    let interface = Interface::make(&tap)?;
    wire.connect(&interface)?;
    guest.wait(EventKind::TapBack, 1)?;
    guest.wait(EventKind::Restarted, 2)?;
    guest.echoes_to(&wire)
}

/// The TAP on a bridge and the bridge, too.
fn bridge_and_process() -> Result<()> {
    need_root()?;
    Host::need_tun()?;
    let first = bridge('e')?;
    let launcher = Command::new(artifact(Artifact::Bulkhead)?);
    let mut guest = OnTap::start(launcher, &format!("bridge={}", first.0))?;
    guest.die_with(|| {
        let port = port_of(&first)?;
        drop(first);
        ip(&format!("link delete {port}"))
    })?;
    guest.wait(EventKind::TapLost, 1)?;
    guest.wait(EventKind::Restarted, 1)?;
    let wire = Wire::on(bridge('e')?)?;
    guest.wait(EventKind::TapBack, 1)?;
    guest.wait(EventKind::Restarted, 2)?;
    guest.echoes_to(&wire)
}
