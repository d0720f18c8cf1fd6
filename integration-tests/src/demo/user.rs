//! The unprivileged user that root's demo uses, and the device nodes lent to it.

use anyhow::{Context, bail};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The name of the user that is made.
const NAME: &str = "bulkhead-demo";
/// Device nodes that the user must be able to open.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/net/tun"];

/// A user made for the demo, or found from an earlier one, with access to the devices. Dropping
/// it takes the access back and removes a user that was made.
#[derive(Debug)]
pub(super) struct DemoUser {
    /// User and group id.
    pub(super) id: u32,
    made: bool,
    /// Each node with its access list before, as getfacl prints it.
    lent: Vec<(&'static str, Vec<u8>)>,
}

impl DemoUser {
    /// Makes the user and lends the devices, and says so.
    pub(super) fn make() -> anyhow::Result<Self> {
        let made = nix::unistd::User::from_name(NAME)?.is_none();
        if made {
            eprintln!("demo: running as root: making the unprivileged user '{NAME}'");
            run(
                "useradd",
                &[
                    "--system",
                    "--user-group",
                    "--no-create-home",
                    "--shell",
                    "/usr/sbin/nologin",
                    NAME,
                ],
            )?;
        }
        let user = nix::unistd::User::from_name(NAME)?.context("the new user is not there")?;
        let mut demo_user = Self {
            id: user.uid.as_raw(),
            made,
            lent: Vec::new(),
        };
        for device in DEVICES.into_iter().filter(|device| Path::new(device).exists()) {
            eprintln!("demo: giving '{NAME}' access to {device} by ACL until the end");
            let before = run("getfacl", &["--absolute-names", device])?;
            run("setfacl", &["-m", &format!("u:{NAME}:rw"), device])?;
            demo_user.lent.push((device, before));
        }
        Ok(demo_user)
    }
}

impl Drop for DemoUser {
    fn drop(&mut self) {
        for (device, before) in self.lent.drain(..) {
            eprintln!("demo: taking back the access to {device}");
            if let Err(error) = restore(&before) {
                eprintln!("demo: {error:#}");
            }
        }
        if self.made {
            eprintln!("demo: removing the user '{NAME}'");
            if let Err(error) = run("userdel", &[NAME]) {
                eprintln!("demo: {error:#}");
            }
        }
    }
}

/// Gives back exactly the access list that getfacl printed.
fn restore(access: &[u8]) -> anyhow::Result<()> {
    let mut setfacl = Command::new("setfacl")
        .arg("--restore=-")
        .stdin(Stdio::piped())
        .spawn()?;
    setfacl
        .stdin
        .take()
        .context("setfacl has no input")?
        .write_all(access)?;
    let status = setfacl.wait()?;
    if status.success() {
        Ok(())
    } else {
        bail!("setfacl --restore failed ({status})")
    }
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    bail!(
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
