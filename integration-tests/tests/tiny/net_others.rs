//! `--net` by a user who owns nothing, and with a passt that serves the guest's queues itself, which few hosts have.

use crate::{
    bad_input::says,
    jails::Place,
    net::{DEADLINE, GUEST_PORT, expect_ok, kept_by, nobodys_folder, segment, wait_until, with_bridge},
};
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    lent::{Lent, NOBODY, become_nobody},
    suite::{Skip, artifact, test},
    tiny::{Events, Run},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use std::{env, fs, os::unix::fs::PermissionsExt, process::Command};
use tempfile::TempDir;
use vm_spec::{control::exit_code, events::EventKind, run_state::ProcessRole};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("net::isolated_unprivileged", isolated),
        test("net::bridge_unprivileged", bridge),
        test("net::user_by_a_passt_that_serves_queues", serving_passt),
        test("net::user_with_a_guard_has_a_relay", guarded),
    ]
}

/// Lends what a launcher opens to a user who owns nothing.
fn lend() -> Result<(Lent, Place)> {
    Host::need_tun()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can become another user".to_owned()));
    }
    Ok((Lent::to(NOBODY)?, Place::make()?))
}

/// The frames of [`isolated`](super::net) go the same way; a user makes the segment and its keeper.
fn isolated() -> Result<()> {
    let (_lent, place) = lend()?;
    let lab = segment("nobody");
    let start = |cmdline: &str, keys: &str| -> Result<Run> {
        let flags = [
            format!("--kernel={}", place.path("tiny-guest").display()),
            "--memory=64M".to_owned(),
            format!("--cmdline={cmdline}"),
            format!("--net=isolated={lab}{keys}"),
        ];
        Run::by(become_nobody(&place.path("bulkhead")), nobodys_folder()?, &flags)
    };
    let mut answering = start("scenario=net-echo packets=100", "")?;
    answering
        .console
        .wait_line("ready=1", DEADLINE)
        .with_context(|| answering.process.stderr().unwrap_or_default())?;
    ensure!(kept_by(NOBODY, &lab)?, "the segment is somebody else's");
    let mut asking = start("scenario=net packets=100 depth=16", ",mac=02:00:00:00:00:0a")?;
    expect_ok(&mut asking)?;
    expect_ok(&mut answering)?;
    wait_until("the segment goes with its last VM", || {
        Ok(!kept_by(NOBODY, &lab)?)
    })
}

/// A bridge of the host's needs what a user has not: it is said, before anything is made and by `--dry-run`, too.
fn bridge() -> Result<()> {
    let (_lent, place) = lend()?;
    let host = with_bridge("wire")?;
    let flags = [
        format!("--kernel={}", place.path("tiny-guest").display()),
        "--net=bridge=wire".to_owned(),
    ];
    let words = [
        "net[0].bridge: cannot add a TAP to 'wire'",
        "cause: this needs CAP_NET_ADMIN in the host's network namespace",
        "hint: run as root, or grant it: sudo setcap cap_net_admin+ep bulkhead",
    ];
    for before in [None, Some("--dry-run".to_owned())] {
        let user = become_nobody(&place.path("bulkhead"));
        let mut launcher = Command::new("nsenter");
        launcher
            .arg(format!("--net=/proc/{}/ns/net", host.pid()))
            .arg(user.get_program())
            .args(user.get_args());
        let flags: Vec<_> = flags.iter().cloned().chain(before).collect();
        let run = Run::by(launcher, nobodys_folder()?, &flags)?;
        says(run, exit_code::ERROR, &words)?;
    }
    Ok(())
}

/// A passt of which the help speaks of vhost-user, and in whose place vhost-user-net serves the guest.
struct Stub(TempDir);

impl Stub {
    fn make() -> Result<Self> {
        Host::need_tun()?;
        let folder = tempfile::tempdir()?;
        let (at, net) = (
            folder.path().display(),
            artifact(Artifact::VhostUserNet)?.display(),
        );
        // As passt does, it leaves once it is ready, with its socket in a process behind it.
        let script = format!(
            "#!/bin/bash\n\
             if [ \"$1\" = --help ]; then echo ' --vhost-user'; exit; fi\n\
             echo \"$*\" >> {at}/started\n\
             if [ \"$1\" = --vhost-user ]; then\n\
             unshare --user --map-root-user --net sh -c 'ip tuntap add stub mode tap vnet_hdr && \
             exec {net} --tap-name=stub --fd='${{!#}} </dev/null >/dev/null 2>>{at}/said &\n\
             else cat <&${{!#}} >/dev/null 2>&1 &\n\
             fi\n\
             echo $! > {at}/pid\n"
        );
        let path = folder.path().join("passt");
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(folder))
    }

    /// A VM whose launcher finds the stub.
    fn run(&self, keys: &str) -> Result<Run> {
        let mut command = Command::new(artifact(Artifact::Bulkhead)?);
        let path = env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.0.path().display()));
        let flags = [
            format!("--kernel={}", artifact(Artifact::TinyGuest)?.display()),
            "--memory=64M".to_owned(),
            "--cmdline=scenario=net-echo packets=1".to_owned(),
            format!("--net=user{keys}"),
        ];
        let mut run = Run::by(command, tempfile::tempdir()?, &flags)?;
        run.console.wait_line("ready=1", DEADLINE).with_context(|| {
            format!(
                "{:?}; {}",
                run.process.stderr(),
                self.read("said").unwrap_or_default()
            )
        })?;
        Ok(run)
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.0.path().join(name)).with_context(|| name.to_owned())
    }

    /// What each was started with, but for the number of its socket.
    fn started(&self) -> Result<Vec<String>> {
        let text = self.read("started")?;
        let before = |line: &str| Some(line.rsplit_once(" --fd ")?.0.to_owned());
        text.lines()
            .map(|line| before(&format!(" {line}")).context("no --fd"))
            .collect()
    }
}

/// The roles of what runs beside the VM's own processes.
fn has(run: &mut Run, role: ProcessRole) -> Result<bool> {
    let state = run.state(DEADLINE)?;
    Ok(state.processes.iter().any(|process| process.role == role))
}

/// It serves the queues with no process of ours between, and another takes its place.
fn serving_passt() -> Result<()> {
    let stub = Stub::make()?;
    let mut run = stub.run(&format!(",publish=127.0.0.1:8080:{GUEST_PORT}/udp"))?;
    for role in [ProcessRole::Net, ProcessRole::NetNamespace] {
        ensure!(!has(&mut run, role)?, "there is a {role:?}");
    }
    let arguments = format!(" --vhost-user --udp-ports 127.0.0.1/8080:{GUEST_PORT}");
    ensure!(stub.started()? == [arguments.as_str()], "{:?}", stub.started()?);
    let first: i32 = stub.read("pid")?.trim().parse()?;
    kill(Pid::from_raw(first), Signal::SIGKILL)?;
    let mut events = Events::default();
    for kind in [EventKind::Disconnected, EventKind::Reconnected] {
        events.wait(&run, DEADLINE, |event| event.event == kind)?;
    }
    ensure!(
        stub.started()? == [arguments.as_str(); 2],
        "{:?}",
        stub.started()?
    );
    Ok(())
}

/// What only vhost-user-net does, passt is not asked for, whatever its version.
fn guarded() -> Result<()> {
    let stub = Stub::make()?;
    let mut run = stub.run(",guard=on")?;
    for role in [ProcessRole::Net, ProcessRole::NetNamespace] {
        ensure!(has(&mut run, role)?, "there is no {role:?}");
    }
    ensure!(stub.started()? == [""], "{:?}", stub.started()?);
    Ok(())
}
