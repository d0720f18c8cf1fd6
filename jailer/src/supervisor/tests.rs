//! A supervisor whose spawner, vmm and clients the tests play.

mod hangs;
mod helpers;
mod stops;
mod upgrades;
mod words;

use super::*;
use crate::wire_fds::{receive_with_fds, send_with_fd};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket, socketpair,
};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use vm_spec::client::{Answer, Channel, Refusal, Request};
use vm_spec::control::{BACKEND_FDS, FromVmm};
use vm_spec::events::EventKind;
use vm_spec::run_state::ProcessRole;
use vm_spec::supervise::{Build, ExitStatus};

/// What the supervisor inherits has numbers that nothing else ever has.
static NEXT: AtomicI32 = AtomicI32::new(500);

fn give(fd: OwnedFd) -> FdNumber {
    let least = NEXT.fetch_add(1, Ordering::Relaxed);
    FdNumber(fcntl(&fd, FcntlArg::F_DUPFD(least)).unwrap())
}

pub(super) fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, kind, None, flags).unwrap()
}

/// What the vmm is to be given of a back end.
pub(super) fn sockets() -> Vec<OwnedFd> {
    (0..BACKEND_FDS).map(|_| pair(SockType::Stream).0).collect()
}

pub(super) struct Play {
    pub(super) supervisor: Supervisor,
    pub(super) spawner: OwnedFd,
    pub(super) vmm: OwnedFd,
    guest: OwnedFd,
    address: UnixAddr,
}

impl Play {
    pub(super) fn begin(name: &str) -> Self {
        let (spawner, of_spawner) = pair(SockType::SeqPacket);
        let (vmm, of_vmm) = pair(SockType::SeqPacket);
        let (guest, of_guest) = pair(SockType::Stream);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let clients = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        let name = format!("bulkhead-supervisor-{name}-{}", std::process::id());
        let address = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        bind(clients.as_raw_fd(), &address).unwrap();
        listen(&clients, Backlog::new(32).unwrap()).unwrap();
        let config = SupervisorConfig {
            name: "vm".into(),
            vmm: give(of_vmm),
            clients: give(clients),
            console: give(of_guest),
            input: None,
            output: None,
            escape: false,
            processes: Vec::new(),
            remotes: Vec::new(),
            spares: vec![3, 4],
            connector: None,
            power_off_grace: 10,
            log_json: false,
            on_device_death: OnDeviceDeath::Restart,
        };
        Self {
            supervisor: Supervisor::new(of_spawner, config).unwrap(),
            spawner,
            vmm,
            guest,
            address,
        }
    }

    pub(super) fn client(&self) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(client.as_raw_fd(), &self.address).unwrap();
        client
    }

    /// One request of it, and what came of it; `None`: it was turned away.
    pub(super) fn ask(&mut self, client: &OwnedFd, request: Request) -> Option<Answer> {
        // To one that was turned away nothing can be sent.
        let _ = send_message(client.as_fd(), 7, request);
        self.supervisor.hear_clients(Instant::now());
        match receive_message(client.as_fd()) {
            Ok(Received::Message(7 | NO_REQUEST, answer)) => Some(answer),
            Ok(Received::End) => None,
            other => panic!("{other:?}"),
        }
    }

    /// Another one that listens; or why it may not.
    fn listener(&mut self, channel: Channel) -> Result<OwnedFd, String> {
        let client = self.client();
        assert_eq!(self.ask(&client, Request::Hello), Some(Answer::Hello));
        let follow = true;
        match self.ask(&client, Request::Listen { channel, follow }) {
            Some(Answer::Listening) => Ok(client),
            other => Err(format!("{other:?}")),
        }
    }

    /// Some events are served.
    fn settle(&mut self) {
        for _ in 0..20 {
            self.supervisor.wait(Some(Instant::now())).unwrap();
        }
    }
}

/// A NIC's process; the log pipe's other end.
fn nic(play: &mut Play) -> OwnedFd {
    process(play, "net0", ProcessRole::Net)
}

/// One more process; the log pipe's other end.
fn process(play: &mut Play, name: &str, role: ProcessRole) -> OwnedFd {
    let (log, theirs) = nix::unistd::pipe().unwrap();
    fcntl(&log, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    let about = SupervisedProcess {
        name: name.into(),
        role,
        serves: None,
        pid: 7,
        log: FdNumber(0),
        slot: role.is_device().then_some(1),
        tap: role.is_device().then_some(0),
        orders: None,
    };
    play.supervisor.processes.push(Process {
        log: LogPipe::new(about.name.clone(), log, Instant::now()),
        about,
        alive: true,
        recovery: Recovery::new(Instant::now()),
        counters: Counters::new(),
        told: devices::of_telling(Instant::now()),
        outstanding: 0,
        upgrade: None,
        orders: None,
        tap: Tap::Present,
        membership: Membership::Member,
    });
    play.supervisor.guest_runs = true;
    theirs
}

/// What the spawner was told, in short.
pub(super) fn told(play: &Play) -> Vec<String> {
    let next = || match receive_with_fds(play.spawner.as_fd()) {
        Ok((Received::Message(_, message), _)) => Some(match message {
            FromSupervisor::Event(event) => format!("{:?}", event.event),
            FromSupervisor::Respawn { .. } => "respawn".to_owned(),
            FromSupervisor::Kill { .. } => "kill".to_owned(),
            FromSupervisor::Tap { .. } => "tap".to_owned(),
            other => format!("{other:?}"),
        }),
        _ => None,
    };
    std::iter::from_fn(next).collect()
}

/// The spawner makes a process and the vmm takes it.
fn joins(play: &mut Play, now: Instant) {
    play.supervisor.device_spawned(0, 8, &sockets(), now);
    let id = play.supervisor.requests;
    assert!(play.supervisor.device_answered(id, Ok(()), now));
}

/// The spawner has sent SIGKILL to the first process.
fn killed(play: &mut Play, now: Instant) {
    send_message(play.spawner.as_fd(), 0, ToSupervisor::Killed { process: 0 }).unwrap();
    play.supervisor.hear_spawner(now).unwrap();
}

/// How many messages are left in a socket.
fn left<T: serde::Serialize + serde::de::DeserializeOwned>(socket: &OwnedFd) -> usize {
    let more = || matches!(receive_message::<T>(socket.as_fd()), Ok(Received::Message(..)));
    std::iter::from_fn(|| more().then_some(())).count()
}

#[test]
fn a_vmm_that_talks_without_end_is_heard_in_turns() {
    let mut play = Play::begin("vmm");
    for _ in 0..hearing::MESSAGES_A_TURN + 20 {
        send_message(play.vmm.as_fd(), 0, FromVmm::Rebooted).unwrap();
    }
    play.supervisor.hear_vmm(hearing::MESSAGES_A_TURN, Instant::now());
    assert_eq!(left::<FromVmm>(play.supervisor.vmm.as_ref().unwrap()), 20);
}

#[test]
fn a_spawner_that_talks_without_end_is_heard_in_turns() {
    let mut play = Play::begin("spawner");
    for process in 0..hearing::MESSAGES_A_TURN as u16 + 20 {
        let message = ToSupervisor::Stopped {
            process,
            stopped: true,
        };
        send_message(play.spawner.as_fd(), 0, message).unwrap();
    }
    play.supervisor.hear_spawner(Instant::now()).unwrap();
    assert_eq!(left::<ToSupervisor>(&play.supervisor.spawner), 20);
}

#[test]
fn a_client_that_asks_without_end_is_heard_in_turns() {
    let mut play = Play::begin("endless");
    let client = play.client();
    for _ in 0..hearing::MESSAGES_A_TURN + 20 {
        send_message(client.as_fd(), 7, Request::Hello).unwrap();
    }
    play.supervisor.hear_clients(Instant::now());
    assert_eq!(left::<Answer>(&client), hearing::MESSAGES_A_TURN);
    play.supervisor.hear_clients(Instant::now());
    assert_eq!(left::<Answer>(&client), 20);
}

#[test]
fn a_client_says_hello_first() {
    let mut play = Play::begin("hello");
    let client = play.client();
    let order = || Request::Order {
        device: "disk0".to_owned(),
        line: "metrics".to_owned(),
    };
    let answer = play.ask(&client, order());
    assert_eq!(
        answer,
        Some(Answer::Refused(Refusal::Because("say hello first".to_owned())))
    );
    assert_eq!(play.ask(&client, Request::Hello), Some(Answer::Hello));
    let answer = play.ask(&client, order());
    assert!(matches!(answer, Some(Answer::Refused(why)) if why.to_string().contains("no device 'disk0'")));
}

#[test]
fn clients_are_few_and_not_waited_for() {
    let mut play = Play::begin("few");
    let clients: Vec<_> = (0..MOST_CLIENTS).map(|_| play.client()).collect();
    let first = play.ask(&clients[0], Request::Hello);
    assert_eq!(first, Some(Answer::Hello));
    let one_more = play.client();
    let told = play.ask(&one_more, Request::Hello);
    assert!(matches!(told, Some(Answer::Failed(why)) if why.contains("8 others")));
    assert_eq!(play.ask(&one_more, Request::Hello), None);
    // They say nothing for too long.
    let later = play.supervisor.clients.deadline().expect("they are idle");
    assert!(later > Instant::now() + Duration::from_secs(5));
    play.supervisor.hear_clients(later + Duration::from_secs(10));
    for client in &clients {
        let end = receive_with_fds::<Answer>(client.as_fd());
        assert!(matches!(end, Ok((Received::End, _))), "{end:?}");
    }
    let one_more = play.client();
    assert_eq!(play.ask(&one_more, Request::Hello), Some(Answer::Hello));
}

#[test]
fn what_is_no_message_ends_its_client_only() {
    let mut play = Play::begin("noise");
    let (good, bad) = (play.client(), play.client());
    assert_eq!(play.ask(&good, Request::Hello), Some(Answer::Hello));
    nix::unistd::write(&bad, &[0xff; 100]).unwrap();
    play.supervisor.hear_clients(Instant::now());
    let end = receive_with_fds::<Answer>(bad.as_fd());
    assert!(matches!(end, Ok((Received::End, _))), "{end:?}");
    assert_eq!(play.ask(&good, Request::Hello), Some(Answer::Hello));
}

#[test]
fn listeners_leave_places_for_orders() {
    let mut play = Play::begin("listeners");
    let mut admitted = Vec::new();
    for channel in [Channel::Console, Channel::Log] {
        for n in 0..=audience::MOST_LISTENERS {
            match play.listener(channel) {
                Ok(client) => admitted.push(client),
                Err(why) => assert!(n == audience::MOST_LISTENERS, "{why}"),
            }
        }
    }
    assert_eq!(admitted.len(), 2 * audience::MOST_LISTENERS);
    let client = play.client();
    assert_eq!(play.ask(&client, Request::Hello), Some(Answer::Hello));
    // All at the console hear the guest, and it hears one of them.
    nix::unistd::write(&play.guest, b"login: ").unwrap();
    nix::unistd::write(&admitted[0], b"root\n").unwrap();
    play.settle();
    let mut bytes = [0; 100];
    for listener in &admitted[..audience::MOST_LISTENERS] {
        assert_eq!(nix::unistd::read(listener, &mut bytes), Ok(7));
        assert_eq!(&bytes[..7], b"login: ");
    }
    assert_eq!(nix::unistd::read(&play.guest, &mut bytes), Ok(5));
    assert_eq!(&bytes[..5], b"root\n");
}

/// Types until nobody takes any more: the guest's socket, the supervisor and the client's socket are full.
fn type_all(play: &mut Play, client: &OwnedFd) -> usize {
    let keys = [b'k'; 256];
    let mut typed = 0;
    loop {
        let before = typed;
        while let Ok(count) = nix::unistd::write(client, &keys) {
            typed += count;
        }
        play.settle();
        if typed == before {
            return typed;
        }
    }
}

#[test]
fn keys_wait_for_a_guest_that_reads_none() {
    let mut play = Play::begin("keys");
    let client = play.listener(Channel::Console).unwrap();
    let typed = type_all(&mut play, &client);
    let mut heard = 0;
    let mut bytes = [0; 4096];
    for _ in 0..typed {
        while let Ok(count) = nix::unistd::read(&play.guest, &mut bytes) {
            assert!(bytes[..count].iter().all(|byte| *byte == b'k'));
            heard += count;
        }
        if heard == typed {
            break;
        }
        play.settle();
    }
    assert_eq!(heard, typed);
    assert_eq!(play.supervisor.console.audience.count(), 1);
}

/// That must not wake the supervisor for ever.
#[test]
fn who_leaves_while_keys_wait_is_noticed() {
    let mut play = Play::begin("leaves");
    let client = play.listener(Channel::Console).unwrap();
    type_all(&mut play, &client);
    drop(client);
    play.settle();
    assert_eq!(play.supervisor.console.audience.count(), 0);
}

#[test]
fn a_launcher_that_failed_has_said_why() {
    let (spawner, of_spawner) = pair(SockType::SeqPacket);
    drop(spawner);
    let end = first_message(&of_spawner);
    assert!(matches!(end, Err(SupervisorError::SpawnerGone)), "{end:?}");
}

#[test]
fn an_answer_that_nobody_waits_for_is_no_failure_of_the_process_that_serves() {
    let mut play = Play::begin("twice");
    let _log = nic(&mut play);
    let mut now = Instant::now();
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now);
    joins(&mut play, now);
    assert_eq!(told(&play), ["Died", "respawn", "Restarted"]);
    for _ in 0..20 {
        play.supervisor.device_not_spawned(0, "it still runs", now);
        now += Duration::from_secs(3);
        play.supervisor.judge_devices(now);
    }
    assert_eq!(told(&play), [""; 0]);
}

/// The process dies with its TAP; the next is on its way when there is a TAP again.
#[test]
fn a_process_that_was_begun_without_the_tap_that_is_back_is_replaced_once() {
    let mut play = Play::begin("tap");
    let log = nic(&mut play);
    let (queue, _) = pair(SockType::Stream);
    let queue = [queue];
    let mut now = Instant::now();
    let say = || nix::unistd::write(&log, b"event: tap-lost: gone\n").unwrap();
    say();
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now);
    assert_eq!(told(&play), ["TapLost", "Died", "respawn"]);
    play.supervisor.tap_came_back(0, &[], now);
    assert!(told(&play).is_empty(), "there was no room for its queues");
    play.supervisor.tap_came_back(0, &queue, now);
    assert_eq!(told(&play), ["tap", "TapBack"], "it cannot be killed yet");
    say();
    play.settle();
    play.supervisor.note_told(now);
    joins(&mut play, now);
    assert_eq!(told(&play), ["Restarted", "kill"], "its TAP is no news");
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.judge_devices(now);
    joins(&mut play, now);
    assert_eq!(told(&play), ["respawn", "Restarted"]);
    // One that waits to be started has the latest in any case.
    say();
    now += Duration::from_secs(1);
    play.supervisor.process_ended(0, ExitStatus::Signal(9), now);
    play.supervisor.tap_came_back(0, &queue, now);
    play.supervisor.judge_devices(now);
    joins(&mut play, now);
    let rest = ["TapLost", "Died", "tap", "TapBack", "respawn", "Restarted"];
    assert_eq!(told(&play), rest);
}

/// Another takes its place, or the VM ends.
#[test]
fn a_lost_passt_is_told() {
    let mut play = Play::begin("passt");
    let _log = nic(&mut play);
    play.supervisor.processes[0].about.tap = Some(3);
    let now = Instant::now();
    play.supervisor.passt_lost(7, now);
    play.supervisor.passt_lost(3, now);
    play.supervisor.nic_came_back(0, &[], now);
    assert_eq!(told(&play), ["Disconnected", "Reconnected"]);
    play.supervisor.on_device_death = OnDeviceDeath::End;
    play.supervisor.passt_lost(3, now);
    let code = play.supervisor.outcome.as_ref().map(|outcome| outcome.code);
    assert_eq!(code, Some(exit_code::BACKEND_LOST));
}

/// Its guest let go of the NIC by itself.
#[test]
fn a_passt_that_a_detached_nic_had_is_missed_by_nobody() {
    let mut play = Play::begin("detached");
    let _log = nic(&mut play);
    let now = Instant::now();
    play.supervisor.on_device_death = OnDeviceDeath::End;
    play.supervisor.device_detached(1, now);
    assert_eq!(told(&play), ["Detached"]);
    play.supervisor.passt_lost(0, now);
    assert_eq!((told(&play), &play.supervisor.outcome), (vec![], &None));
}

#[test]
fn a_tap_that_nobody_takes_over_is_not_back() {
    let mut play = Play::begin("given-up");
    let _log = nic(&mut play);
    let now = Instant::now();
    let condemned = play.supervisor.processes[0].recovery.condemn(now, "no answer");
    play.supervisor.carry_out(0, condemned);
    killed(&mut play, now);
    play.supervisor.judge_devices(now + Duration::from_secs(60));
    let (queue, _) = pair(SockType::Stream);
    play.supervisor.tap_came_back(0, &[queue], now);
    assert_eq!(told(&play), ["kill"]);
    let client = play.client();
    assert_eq!(play.ask(&client, Request::Hello), Some(Answer::Hello));
    let device = "net0".to_owned();
    let (binary, _) = pair(SockType::Stream);
    send_with_fd(client.as_fd(), 7, Request::Upgrade { device }, binary.as_fd()).unwrap();
    play.supervisor.hear_clients(now);
    let answer = receive_message::<Answer>(client.as_fd());
    assert!(
        matches!(&answer, Ok(Received::Message(7, Answer::Refused(why))) if why.to_string().contains("given up")),
        "{answer:?}"
    );
    let (device, line) = ("net0".to_owned(), "metrics".to_owned());
    let answer = play.ask(&client, Request::Order { device, line });
    assert!(
        matches!(&answer, Some(Answer::Refused(why)) if why.to_string().contains("given up")),
        "{answer:?}"
    );
    play.supervisor.processes[0].recovery = Recovery::new(now);
    play.supervisor.on_device_death = OnDeviceDeath::End;
    play.supervisor.tap_lost(0, "gone");
    let (queue, _) = pair(SockType::Stream);
    play.supervisor.tap_came_back(0, &[queue], now);
    assert_eq!(told(&play), [format!("{:?}", EventKind::TapLost)]);
}

#[test]
fn an_end_after_a_long_wait_has_its_whole_time() {
    let mut play = Play::begin("leaves");
    let (person, input) = pair(SockType::Stream);
    let (guest, _vmm) = pair(SockType::Stream);
    play.supervisor.console = Console::new(guest, Some(input), None, true);
    let typing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let typed = Instant::now();
        nix::unistd::write(&person, b"\x01x").unwrap();
        (typed, person)
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while play.supervisor.phase == Phase::Running && Instant::now() < deadline {
        play.supervisor.wait(Some(deadline)).unwrap();
    }
    let (typed, _person) = typing.join().unwrap();
    let Phase::Stopping(at) = play.supervisor.phase else {
        panic!("{:?}", play.supervisor.phase)
    };
    assert!(at >= typed + EXIT_DEADLINE);
}
