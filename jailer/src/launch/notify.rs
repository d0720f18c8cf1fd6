//! Tells whoever started `bulkhead run` as a service how the VM is doing (sd_notify(3)).

use crate::tell::tell;
use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Names the socket.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// The way to the service manager, if there is one.
pub(super) struct Notify(Option<UnixDatagram>);

impl Notify {
    /// Connects while paths can still be seen. Whoever cannot be reached is not told: the VM runs all the same.
    pub(super) fn connect() -> Self {
        let Some(name) = env::var_os(VARIABLE) else {
            return Self(None);
        };
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&name),
        };
        let connect = |address: SocketAddr| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        match address.and_then(connect) {
            Ok(socket) => Self(Some(socket)),
            Err(error) => {
                tell(format_args!(
                    "bulkhead: warning: {VARIABLE}: cannot reach the service manager: {error}"
                ));
                Self(None)
            }
        }
    }

    /// The guest runs.
    pub(super) fn ready(&self) {
        self.say("READY=1\nSTATUS=the guest runs");
    }

    /// The VM ends.
    pub(super) fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=the VM ends");
    }

    /// A manager that does not read is not waited for.
    fn say(&self, state: &str) {
        if let Some(socket) = &self.0 {
            let _ = socket.send(state.as_bytes());
        }
    }
}
