//! apt-get as root, which waits for others that install meanwhile.

use anyhow::{Context, bail};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for others: a new machine upgrades itself in its first minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks at a lock that only root can wait for.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Words of apt-get's when another has the lock of the package lists.
const LOCKED: &str = "Could not get lock";
/// What apt's downloads go through, in both cases.
const PROXIES: [&str; 5] = ["http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"];

/// How apt-get is run here.
pub(super) struct AptGet {
    root: bool,
    path: OsString,
    /// What reaches it, whatever sudo drops.
    environment: Vec<(String, OsString)>,
    look_again: Duration,
}

impl AptGet {
    /// By root, or by a user who has sudo.
    pub(super) fn new(root: bool) -> Self {
        let proxies = PROXIES
            .into_iter()
            .flat_map(|name| [name.to_owned(), name.to_uppercase()])
            .filter_map(|name| std::env::var_os(&name).map(|value| (name, value)));
        let fixed = [("DEBIAN_FRONTEND", "noninteractive"), ("LC_ALL", "C.UTF-8")];
        let fixed = fixed.map(|(name, value)| (name.to_owned(), value.into()));
        Self {
            root,
            path: images::search_path(),
            environment: fixed.into_iter().chain(proxies).collect(),
            look_again: LOOK_AGAIN,
        }
    }

    /// Fetches the package lists.
    pub(super) fn update(&self, arguments: &[String]) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut told = false;
        loop {
            // apt's option waits for dpkg's lock, and for no other.
            let mut command = self.command(arguments)?;
            if told {
                command.stdout(Stdio::null());
            }
            let output = command.stderr(Stdio::piped()).output();
            let output = output.context("cannot run apt-get")?;
            let said = String::from_utf8_lossy(&output.stderr);
            if output.status.success() || !said.contains(LOCKED) || Instant::now() > end {
                eprint!("{said}");
                return ended(output.status, arguments);
            }
            if !told {
                eprintln!("{said}waiting for it");
                told = true;
            }
            thread::sleep(self.look_again);
        }
    }

    /// Installs packages.
    pub(super) fn install(&self, arguments: &[String]) -> anyhow::Result<()> {
        let status = self.command(arguments)?.status().context("cannot run apt-get")?;
        ended(status, arguments)
    }

    /// Whether sudo lets this user run `env`: it may allow apt-get alone.
    fn may_set(&self) -> bool {
        let mut sudo = Command::new("sudo");
        sudo.args(["-l", "env"])
            .env("PATH", &self.path)
            .stdout(Stdio::null());
        sudo.status().is_ok_and(|status| status.success())
    }

    /// What it prints is for people.
    fn command(&self, arguments: &[String]) -> anyhow::Result<Command> {
        let mut command = if self.root {
            Command::new("apt-get")
        } else {
            let assigned = self.environment.iter().map(|(name, value)| {
                let mut assigned = OsString::from(format!("{name}="));
                assigned.push(value);
                assigned
            });
            let mut sudo = Command::new("sudo");
            if self.may_set() {
                sudo.arg("env").args(assigned);
            }
            sudo.arg("apt-get");
            sudo
        };
        command
            .arg(format!("-oDPkg::Lock::Timeout={}", PATIENCE.as_secs()))
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PATH", &self.path)
            .stdout(std::io::stderr().as_fd().try_clone_to_owned()?);
        Ok(command)
    }
}

fn ended(status: ExitStatus, arguments: &[String]) -> anyhow::Result<()> {
    if !status.success() {
        bail!("apt-get {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    /// Drops the environment, as sudo does.
    const SUDO: &str = "#!/bin/sh\n[ \"$1\" = -l ] && exit 0\nexec env -i PATH=\"$PATH\" \"$@\"\n";
    /// Notes its call. Somebody has the lists the first time; another source than theirs is gone for good.
    const APT_GET: &str = "#!/bin/sh\ncd \"${0%/*}\"\n\
        echo \"$DEBIAN_FRONTEND $https_proxy $NO_PROXY $*\" >>calls\n\
        case $* in\n\
        *gone*) echo 'E: gone' >&2; exit 100;;\n\
        *update*) [ -e free ] || { >free; echo 'E: Could not get lock /x' >&2; exit 100; };;\n\
        esac\n";

    #[test]
    fn it_waits_for_others_and_goes_through_the_user_s_proxies() {
        for root in [true, false] {
            let scratch = tempfile::tempdir().unwrap();
            for (name, script) in [("sudo", SUDO), ("apt-get", APT_GET)] {
                let file = scratch.path().join(name);
                fs::write(&file, script).unwrap();
                fs::set_permissions(file, Permissions::from_mode(0o755)).unwrap();
            }
            let mut apt = AptGet::new(root);
            let path = format!("{}:/usr/bin:/bin", scratch.path().display());
            apt.path = path.into();
            apt.look_again = Duration::from_millis(10);
            apt.environment.retain(|(name, _)| name == "DEBIAN_FRONTEND");
            apt.environment.extend([
                ("https_proxy".to_owned(), "http://p:1".into()),
                ("NO_PROXY".to_owned(), "a b".into()),
            ]);
            apt.update(&["update".to_owned()]).unwrap();
            apt.install(&["install".to_owned(), "x".to_owned()]).unwrap();
            assert!(apt.update(&["update".to_owned(), "gone".to_owned()]).is_err());
            let with = "noninteractive http://p:1 a b -oDPkg::Lock::Timeout=600";
            assert_eq!(
                fs::read_to_string(scratch.path().join("calls")).unwrap(),
                format!("{with} update\n{with} update\n{with} install x\n{with} update gone\n")
            );
        }
    }
}
