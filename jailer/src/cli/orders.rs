//! Orders to a running VM's device processes, and `bulkhead resize`.

use super::connection::{Connection, not_done};
use super::ps;
use crate::failure::Failure;
use std::time::Duration;
use vm_spec::client::{Answer, Request};
use vm_spec::run_state::ProcessRole;
use vm_spec::size::ByteSize;

/// For an answer: more than the supervisor gives the process.
const DEADLINE: Duration = Duration::from_secs(20);

/// Gives the disk another size, which its guest is told at once.
///
/// # Errors
/// A [`Failure`] when no such VM or disk runs, or its format cannot do that.
pub(super) fn resize(vm: &str, disk: &str, size: ByteSize) -> Result<String, Failure> {
    let running = ps::find(vm)?;
    if running.role_of(disk)? != ProcessRole::Disk {
        return Err(running.naming(Failure::usage(format!("{disk} is no disk"))));
    }
    let mut connection = Connection::open(&running)?;
    let said = order(&mut connection, disk, format!("size {}", size.0))?;
    match said.trim().strip_prefix("error: ") {
        Some(why) => Err(Failure::host(format!("{disk} was not resized")).cause(why)),
        None => Ok(String::new()),
    }
}

/// What the device's process answers to `line`. It may be anything.
///
/// # Errors
/// A [`Failure`] when no such device runs.
pub(super) fn order(connection: &mut Connection, device: &str, line: String) -> Result<String, Failure> {
    let request = Request::Order {
        device: device.to_owned(),
        line,
    };
    match connection.ask(request, None, DEADLINE)? {
        Answer::Ordered(said) => Ok(said),
        answer => Err(not_done(format!("{device} took no order"), answer)),
    }
}
