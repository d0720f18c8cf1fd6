//! Device nodes lent to an unprivileged user by ACL, for as long as a value lives.

use crate::suite::Skip;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A user that owns nothing here.
pub const NOBODY: u32 = 54_321;
/// Device nodes that a launcher opens.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/net/tun"];

/// Whoever lends, in whatever process, holds this folder's lock: else they take back each other's access, and the last
/// gives for good what another had lent.
const TURN: &str = "/dev";

/// Access to the device nodes that exist; taken back when dropped.
#[derive(Debug)]
pub struct Lent {
    /// As getfacl printed it before, without what the same user had: somebody who was killed had lent it.
    before: String,
    devices: Vec<&'static str>,
    _turn: File,
}

impl Lent {
    /// Lends to a user id.
    ///
    /// # Errors
    /// [`Skip`] without the package acl; otherwise what setfacl says.
    pub fn to(user: u32) -> Result<Self> {
        let exists = |device: &&str| Path::new(device).exists();
        let devices: Vec<_> = DEVICES.into_iter().filter(exists).collect();
        let turn = File::open(TURN)?;
        let busy = || eprintln!("waiting for another process that lends {}", devices.join(" and "));
        images::cache::lock(&turn, busy).context("cannot lock /dev")?;
        let getfacl = Command::new("getfacl")
            .args(["--absolute-names", "--numeric"])
            .args(&devices)
            .output()
            .map_err(|_| Skip("the package acl is not installed".to_owned()))?;
        ensure!(
            getfacl.status.success(),
            "getfacl: {}",
            String::from_utf8_lossy(&getfacl.stderr)
        );
        let lent = Self {
            before: without(user, &String::from_utf8(getfacl.stdout)?),
            devices,
            _turn: turn,
        };
        let status = Command::new("setfacl")
            .args(["-m", &format!("u:{user}:rw")])
            .args(&lent.devices)
            .status()?;
        ensure!(status.success(), "setfacl: {status}");
        Ok(lent)
    }

    /// Which nodes.
    #[must_use]
    pub fn devices(&self) -> &[&'static str] {
        &self.devices
    }

    /// Gives back exactly the access list that getfacl printed.
    fn restore(&self) -> Result<()> {
        let mut setfacl = Command::new("setfacl")
            .arg("--restore=-")
            .stdin(Stdio::piped())
            .spawn()?;
        let mut input = setfacl.stdin.take().context("setfacl has no input")?;
        input.write_all(self.before.as_bytes())?;
        drop(input);
        let status = setfacl.wait()?;
        ensure!(status.success(), "setfacl --restore: {status}");
        Ok(())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            eprintln!("cannot take back the access to {:?}: {error:#}", self.devices);
        }
    }
}

/// Access lists without the entry of a user.
fn without(user: u32, lists: &str) -> String {
    let entry = format!("user:{user}:");
    lists
        .split_inclusive('\n')
        .filter(|line| !line.starts_with(&entry))
        .collect()
}

/// `program` as [`NOBODY`].
#[must_use]
pub fn become_nobody(program: &Path) -> Command {
    become_user(NOBODY, NOBODY, program)
}

/// `program` as another user, in one group.
#[must_use]
pub fn become_user(user: u32, group: u32, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([format!("--reuid={user}"), format!("--regid={group}")])
        .arg("--clear-groups")
        .arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_left_who_was_killed_is_not_given_back() {
        let lists = "# file: /dev/kvm\nuser::rw-\nuser:7:rw-\nuser:77:rw-\ngroup::rw-\n";
        assert_eq!(without(7, lists), lists.replace("user:7:rw-\n", ""));
        assert_eq!(without(8, lists), lists);
    }

    #[test]
    fn one_lends_at_a_time() {
        // Only root can, where the package acl is.
        let Ok(lent) = Lent::to(NOBODY) else { return };
        let another = File::open(TURN).unwrap();
        assert!(another.try_lock().is_err());
        drop(lent);
        another.lock().unwrap();
    }
}
