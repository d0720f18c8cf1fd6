//! The unprivileged user that root's demo uses, and the device nodes lent to it.

use crate::lent::Lent;
use anyhow::{Context, bail};
use std::process::Command;

/// The name of the user that is made.
const NAME: &str = "bulkhead-demo";

/// A user made for the demo, or found from an earlier one, with access to the devices. Dropping
/// it takes the access back and removes a user that was made.
#[derive(Debug)]
pub(super) struct DemoUser {
    /// User and group id.
    pub(super) id: u32,
    made: bool,
    lent: Option<Lent>,
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
            lent: None,
        };
        let lent = Lent::to(demo_user.id)?;
        eprintln!(
            "demo: '{NAME}' has access to {} by ACL until the end",
            lent.devices().join(" and ")
        );
        demo_user.lent = Some(lent);
        Ok(demo_user)
    }
}

impl Drop for DemoUser {
    fn drop(&mut self) {
        if let Some(lent) = self.lent.take() {
            eprintln!("demo: taking back the access to {}", lent.devices().join(" and "));
        }
        if self.made {
            eprintln!("demo: removing the user '{NAME}'");
            if let Err(error) = run("userdel", &[NAME]) {
                eprintln!("demo: {error:#}");
            }
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", images::search_path())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
