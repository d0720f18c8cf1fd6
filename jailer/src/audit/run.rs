//! The audit: first what each attack can do on this host with every wall off, then against the
//! jail.

use super::catalogue::{ATTACKS, Attack};
use super::order::{BEGUN, EXECUTED};
use super::report::{self, Outcome, Report};
use super::targets::{Targets, Victim};
use super::wall::{Removed, Wall};
use crate::failure::Failure;
use crate::launch::identity::{Identities, Settled};
use crate::launch::probe::{Probe, Stage};
use crate::launch::signals::{LEAVING, take_by_descriptor};
use crate::sandbox::{Role, Root};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{geteuid, pipe2, read};
use std::cell::Cell;
use std::io::{IsTerminal, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A probe that has said nothing for this long hangs.
const DEADLINE: Duration = Duration::from_secs(10);

/// What to audit.
#[derive(Clone, Debug)]
pub struct Options {
    /// Take this wall away.
    pub without: Option<Wall>,
    /// Only this role.
    pub role: Option<Role>,
    /// Only this attack.
    pub attack: Option<&'static Attack>,
    /// The folder with the probes; else `probes` beside this program.
    pub probes: Option<PathBuf>,
    /// Print JSON.
    pub json: bool,
}

/// Runs the audit; the text to print, and the exit code: 1 when something got through. `on_progress` is told how many
/// attempts are done, and of how many. The calling process must have one thread; signals that end it no longer do so
/// by themselves.
///
/// # Errors
/// A [`Failure`] where no probe could be started, or one did not do as it was told, or a signal ended the audit.
pub fn run(options: &Options, on_progress: &dyn Fn(u64, u64)) -> Result<(String, u8), Failure> {
    let host = |e: std::io::Error| Failure::host("cannot prepare the audit").because(&e);
    let uid = geteuid().as_raw();
    // Before there is anything to remove.
    let signals = take_by_descriptor(LEAVING).map_err(|e| host(e.into()))?;
    let targets = Targets::make().map_err(host)?;
    let stage = Stage::open(
        &targets.folder.join("kernel"),
        &targets.folder.join("disk"),
        &probes(options)?,
    )?;
    let mut roles = stage.roles();
    roles.retain(|role| options.role.is_none_or(|wanted| wanted == *role));
    if let (Some(role), true) = (options.role, roles.is_empty()) {
        return Err(
            Failure::host(format!("--role: nothing on this host runs as {role}"))
                .hint("without /dev/net/tun there is no NIC"),
        );
    }
    let attacks = options
        .attack
        .map_or_else(|| ATTACKS.iter().collect(), |one| vec![one]);
    let attempts = roles.len() * attacks.len();
    let done = Cell::new(0);
    let tried = || {
        done.set(done.get() + 1);
        on_progress(done.get(), 2 * attempts as u64);
    };
    let place = Place {
        stage: &stage,
        targets: &targets,
        signals: &signals,
        tried: &tried,
    };
    let bare = Pass::new(&place, Removed::ALL, Settled::Own)?.all(&roles, &attacks)?;
    let (identity, _) =
        Identities::begin(&stage.binaries())?.enter(Root::Kept, |uid, gid| targets.give_to(uid, gid))?;
    targets.open_to_all().map_err(host)?;
    let removed = options.without.map_or(Removed::NONE, Removed::only);
    let jailed = Pass::new(&place, removed, identity)?.all(&roles, &attacks)?;
    let cells = jailed
        .into_iter()
        .zip(bare)
        .map(|(mut cell, bare)| {
            if bare.outcome != Outcome::Through {
                cell.outcome = Outcome::Host;
            }
            cell
        })
        .collect();
    let report = Report {
        uid,
        without: options.without,
        roles,
        cells,
    };
    let text = if options.json {
        report.json()
    } else {
        report.text(std::io::stdout().is_terminal())
    };
    Ok((text, u8::from(report.breaches() > 0)))
}

fn probes(options: &Options) -> Result<PathBuf, Failure> {
    if let Some(folder) = &options.probes {
        return Ok(folder.clone());
    }
    std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.parent()?.join("probes")))
        .ok_or_else(|| Failure::host("cannot find the folder of this program"))
}

/// What attempts are made with.
struct Place<'a> {
    stage: &'a Stage,
    targets: &'a Targets,
    /// [`LEAVING`].
    signals: &'a SignalFd,
    /// Called after each attempt.
    tried: &'a dyn Fn(),
}

/// One pass over every role and attack.
struct Pass<'a> {
    place: &'a Place<'a>,
    removed: Removed,
    identity: Settled,
    victim: Victim,
}

impl<'a> Pass<'a> {
    fn new(place: &'a Place<'a>, removed: Removed, identity: Settled) -> Result<Self, Failure> {
        let victim = Victim::start().map_err(|e| Failure::host("cannot make a process").because(&e))?;
        Ok(Self {
            place,
            removed,
            identity,
            victim,
        })
    }

    fn all(&self, roles: &[Role], attacks: &[&'static Attack]) -> Result<Vec<report::Cell>, Failure> {
        let mut cells = Vec::new();
        for attack in attacks {
            for role in roles {
                let outcome = self.attempt(*role, attack)?;
                (self.place.tried)();
                cells.push(report::Cell {
                    role: *role,
                    attack,
                    outcome,
                });
            }
        }
        Ok(cells)
    }

    fn attempt(&self, role: Role, attack: &Attack) -> Result<Outcome, Failure> {
        let failed = |e: &dyn std::error::Error| {
            Failure::host(format!("cannot try '{}' as {role}", attack.name)).because(e)
        };
        let Place {
            stage,
            targets,
            signals,
            ..
        } = self.place;
        targets.renew().map_err(|e| failed(&e))?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(&e))?;
        let mut order = targets.order(role, attack.name, self.removed, &self.victim);
        let mut probe = stage.start(&mut order, &write, &targets.terminal, self.identity.of(0))?;
        drop(write);
        let heard = listen(&read, signals);
        // It has ended, or it hangs; whatever it did, it must not outlive its report.
        let finished = wait(&probe, matches!(heard, Ok(Heard::Report(_)))).map_err(|e| failed(&e))?;
        let report = match heard.map_err(|e| failed(&e))? {
            Heard::Report(report) => Some(report),
            Heard::Nothing => None,
            Heard::Signal(number) => {
                return Err(
                    Failure::host("the audit was ended by a signal").exiting(128_u8.saturating_add(number))
                );
            }
        };
        judge(attack, report.as_deref(), finished).ok_or_else(|| complain(role, attack, &mut probe, finished))
    }
}

/// What came of a probe.
enum Heard {
    /// Its whole report.
    Report(Vec<u8>),
    /// No end of a report in time.
    Nothing,
    /// Someone wants us to end, by this signal.
    Signal(u8),
}

fn listen(pipe: &OwnedFd, signals: &SignalFd) -> nix::Result<Heard> {
    let end = Instant::now() + DEADLINE;
    let mut report = Vec::new();
    loop {
        if let Some(info) = signals.read_signal()? {
            return Ok(Heard::Signal(u8::try_from(info.ssi_signo).unwrap_or(0)));
        }
        let left = end.saturating_duration_since(Instant::now());
        let mut ready = [pipe.as_fd(), signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(&mut ready, timeout)? == 0 {
            return Ok(Heard::Nothing);
        }
        if ready[0].any() != Some(true) {
            continue;
        }
        let mut bytes = [0; 16];
        match read(pipe, &mut bytes)? {
            0 => return Ok(Heard::Report(report)),
            n => report.extend_from_slice(&bytes[..n]),
        }
    }
}

/// Reaps the probe; one that has not `ended` is killed first.
fn wait(probe: &Probe, ended: bool) -> nix::Result<WaitStatus> {
    let pid = probe.child.pid;
    if !ended {
        kill(pid, Signal::SIGKILL)?;
    }
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// `None`: the probe did not get as far as its attack, or ended in a way of its own.
fn judge(attack: &Attack, report: Option<&[u8]>, finished: WaitStatus) -> Option<Outcome> {
    match (report?, finished) {
        ([BEGUN, errno @ ..], WaitStatus::Exited(_, 0)) => {
            let errno = i32::from_ne_bytes(errno.try_into().ok()?);
            Some(match (errno, attack.wall_of(errno)) {
                (0, _) => Outcome::Through,
                (_, Some(wall)) => Outcome::Stopped(wall),
                (_, None) => Outcome::Unexplained(errno),
            })
        }
        ([BEGUN], WaitStatus::Signaled(_, Signal::SIGSYS, _)) => Some(Outcome::Stopped(Wall::Seccomp)),
        ([BEGUN], WaitStatus::Exited(_, EXECUTED)) => Some(Outcome::Through),
        _ => None,
    }
}

fn complain(role: Role, attack: &Attack, probe: &mut Probe, finished: WaitStatus) -> Failure {
    let mut words = String::new();
    // What it said is a help, not a must.
    let _ = probe.log.rewind();
    let _ = (&mut probe.log).take(4096).read_to_string(&mut words);
    let last = words.lines().last().unwrap_or("it said nothing").to_owned();
    Failure::host(format!("the probe of {role} did not try '{}'", attack.name))
        .cause(format!("{finished:?}; {last}"))
        .hint("is it built with the feature jailer/probe? docs/isolation-tests.md says how")
}
