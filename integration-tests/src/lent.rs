//! Device nodes lent to an unprivileged user by ACL, for as long as a value lives.

use crate::suite::Skip;
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A user that owns nothing here.
pub const NOBODY: u32 = 54_321;
/// Device nodes that a launcher opens.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/net/tun"];

/// Threads that lend at the same time must not take back each other's access.
static LENDING: Mutex<()> = Mutex::new(());

/// Access to the device nodes that exist; taken back when dropped.
#[derive(Debug)]
pub struct Lent {
    /// As getfacl printed it before.
    before: Vec<u8>,
    devices: Vec<&'static str>,
    _turn: MutexGuard<'static, ()>,
}

impl Lent {
    /// Lends to a user id.
    ///
    /// # Errors
    /// [`Skip`] without the package acl; otherwise what setfacl says.
    pub fn to(user: u32) -> Result<Self> {
        let exists = |device: &&str| Path::new(device).exists();
        let devices: Vec<_> = DEVICES.into_iter().filter(exists).collect();
        // What a failed test left is still in order: its access was taken back.
        let turn = LENDING.lock().unwrap_or_else(PoisonError::into_inner);
        let getfacl = Command::new("getfacl")
            .arg("--absolute-names")
            .args(&devices)
            .output()
            .map_err(|_| Skip("the package acl is not installed".to_owned()))?;
        ensure!(
            getfacl.status.success(),
            "getfacl: {}",
            String::from_utf8_lossy(&getfacl.stderr)
        );
        let lent = Self {
            before: getfacl.stdout,
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
        input.write_all(&self.before)?;
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
