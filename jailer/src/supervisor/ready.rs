//! What the supervisor waits for, in one poll.

use super::orders::Orders;
use super::{Supervisor, SupervisorError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

/// What a poll found.
#[derive(Default)]
pub(super) struct Ready {
    pub(super) guest_readable: bool,
    pub(super) guest_writable: bool,
    pub(super) input: bool,
    pub(super) output: bool,
    pub(super) logs: Vec<bool>,
    /// What was found of each, in their order.
    pub(super) console_listeners: Vec<PollFlags>,
    pub(super) log_listeners: Vec<PollFlags>,
}

impl Ready {
    pub(super) fn poll(of: &Supervisor, timeout: PollTimeout) -> Result<Self, SupervisorError> {
        let mut wanted = vec![
            (Some(&of.spawner), PollFlags::POLLIN),
            (of.vmm.as_ref(), PollFlags::POLLIN),
            (of.console.guest_readable(), PollFlags::POLLIN),
            (of.console.guest_writable(), PollFlags::POLLOUT),
            (of.console.input(), PollFlags::POLLIN),
            (of.console.output(), PollFlags::POLLOUT),
            (of.connector.as_ref(), PollFlags::POLLIN),
        ];
        wanted.extend(of.processes.iter().map(|p| (p.log.pipe(), PollFlags::POLLIN)));
        wanted.extend(of.processes.iter().map(|p| {
            let orders = p.orders.as_ref().and_then(Orders::source);
            (orders, PollFlags::POLLIN)
        }));
        wanted.extend(of.clients.sockets().map(|fd| (Some(fd), PollFlags::POLLIN)));
        let console_at = wanted.len();
        wanted.extend(of.console.listeners().map(|(fd, flags)| (Some(fd), flags)));
        let log_at = wanted.len();
        let listeners = of.log.audience.sources(true);
        wanted.extend(listeners.map(|(fd, flags)| (Some(fd), flags)));
        // What has nothing to wait for is left out; `places` keeps the order.
        let mut fds = Vec::with_capacity(wanted.len());
        let places: Vec<Option<usize>> = wanted
            .into_iter()
            .map(|(fd, flags)| {
                fd.map(|fd| {
                    fds.push(PollFd::new(fd.as_fd(), flags));
                    fds.len() - 1
                })
            })
            .collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(SupervisorError::Poll(e.into())),
        }
        let found = |place: &Option<usize>| {
            let found = place.and_then(|i| fds[i].revents());
            found.unwrap_or(PollFlags::empty())
        };
        let ready = |place: &Option<usize>| !found(place).is_empty();
        Ok(Self {
            guest_readable: ready(&places[2]),
            guest_writable: ready(&places[3]),
            input: ready(&places[4]),
            output: ready(&places[5]),
            logs: places[7..7 + of.processes.len()].iter().map(ready).collect(),
            console_listeners: places[console_at..log_at].iter().map(found).collect(),
            log_listeners: places[log_at..].iter().map(found).collect(),
        })
    }
}
