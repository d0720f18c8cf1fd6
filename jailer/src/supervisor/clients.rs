//! The control socket: other commands of the VM's owner ask for changes to the running VM. Few at
//! a time, each with a deadline, and nobody is waited for.

use super::Supervisor;
use super::audience::MOST_LISTENERS;
use super::hearing::MESSAGES_A_TURN;
use crate::wire::{Received, send_message};
use crate::wire_fds::receive_with_fds;
use nix::sys::socket::{SockFlag, accept4};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vm_spec::client::{Answer, Channel, Refusal, Request};

/// Most clients at a time; another one is turned away.
pub const MOST_CLIENTS: u32 = 8;
/// What a client that is turned away is told has this number, which no request has.
pub const NO_REQUEST: u64 = 0;
/// A client that asks for nothing for this long is turned away.
const IDLE_DEADLINE: Duration = Duration::from_secs(10);

/// One connection.
pub(super) struct Client {
    socket: OwnedFd,
    greeted: bool,
    /// Since when nothing is under way for it.
    idle: Option<Instant>,
    /// So that an answer finds it, whoever came and went meanwhile.
    number: u64,
}

/// Who waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Asker {
    pub(super) client: u64,
    pub(super) request: u64,
}

/// All of them, and where more come from.
pub(super) struct Clients {
    listener: OwnedFd,
    all: Vec<Client>,
    count: u64,
}

impl Clients {
    pub(super) fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            all: Vec::new(),
            count: 0,
        }
    }

    /// What to wait for.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.listener]
            .into_iter()
            .chain(self.all.iter().map(|client| &client.socket))
    }

    /// When the next one has been idle for too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let idle = self.all.iter().filter_map(|client| client.idle);
        idle.min().map(|since| since + IDLE_DEADLINE)
    }

    /// Lets new ones in and idle ones go; `listeners` have their places too.
    fn look(&mut self, listeners: usize, now: Instant) {
        self.all
            .retain(|client| client.idle.is_none_or(|since| now < since + IDLE_DEADLINE));
        for _ in 0..MESSAGES_A_TURN {
            let Ok(socket) = accept(&self.listener) else { break };
            if self.all.len() + listeners < MOST_CLIENTS as usize {
                self.count += 1;
                self.all.push(Client {
                    socket,
                    greeted: false,
                    idle: Some(now),
                    number: self.count,
                });
            } else {
                let why = format!("{MOST_CLIENTS} others talk to it already");
                // It is let go in any case.
                let _ = send_message(socket.as_fd(), NO_REQUEST, Answer::Failed(why));
            }
        }
    }

    /// One request, with its descriptors.
    fn next(&mut self) -> Option<(Asker, Request, Vec<OwnedFd>)> {
        let mut at = 0;
        while let Some(client) = self.all.get_mut(at) {
            match receive_with_fds(client.socket.as_fd()) {
                Ok((Received::Message(request, body), fds)) => {
                    client.idle = None;
                    let asker = Asker {
                        client: client.number,
                        request,
                    };
                    return Some((asker, body, fds));
                }
                Ok((Received::Nothing, _)) => at += 1,
                Ok((Received::End, _)) | Err(_) => drop(self.all.remove(at)),
            }
        }
        None
    }

    /// Whether the client has said hello, now or before.
    fn greet(&mut self, asker: Asker, request: &Request) -> bool {
        let client = self.all.iter_mut().find(|client| client.number == asker.client);
        client.is_some_and(|client| {
            client.greeted |= *request == Request::Hello;
            client.greeted
        })
    }

    /// Answers, and lets it go from here: it makes no more requests.
    fn release(&mut self, asker: Asker, answer: Answer) -> Option<OwnedFd> {
        let at = self.all.iter().position(|c| c.number == asker.client)?;
        let socket = self.all.remove(at).socket;
        let sent = send_message(socket.as_fd(), asker.request, answer);
        sent.is_ok().then_some(socket)
    }

    /// Answers; a client that is gone or does not read is forgotten.
    pub(super) fn answer(&mut self, asker: Asker, answer: Answer, now: Instant) {
        let Some(at) = self.all.iter().position(|c| c.number == asker.client) else {
            return;
        };
        self.all[at].idle = Some(now);
        if send_message(self.all[at].socket.as_fd(), asker.request, answer).is_err() {
            self.all.remove(at);
        }
    }
}

fn accept(listener: &OwnedFd) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    accept4(listener.as_raw_fd(), flags).map(crate::inherit::accepted)
}

impl Supervisor {
    /// Serves clients, of whom none can keep the others waiting; what is left wakes again.
    pub(super) fn hear_clients(&mut self, now: Instant) {
        let listeners = self.console.audience.count() + self.log.audience.count();
        self.clients.look(listeners, now);
        for _ in 0..MESSAGES_A_TURN {
            let Some((asker, request, mut fds)) = self.clients.next() else {
                break;
            };
            let greeted = self.clients.greet(asker, &request);
            let because = Refusal::Because;
            let begun = match request {
                _ if !greeted => Err(because("say hello first".to_owned())),
                Request::Hello => {
                    self.clients.answer(asker, Answer::Hello, now);
                    Ok(())
                }
                Request::Upgrade { device } => match fds.pop() {
                    Some(binary) => self.upgrade(&device, &binary, asker, now).map_err(because),
                    None => Err(because("no binary came with the request".to_owned())),
                },
                Request::Order { device, line } => self.order(&device, &line, asker, now).map_err(because),
                Request::Listen { channel, follow } => self.listen(channel, follow, asker).map_err(because),
                Request::Devices => {
                    let taken = self.taken_ids().map(str::to_owned).collect();
                    self.clients.answer(asker, Answer::Devices(taken), now);
                    Ok(())
                }
                Request::Attach(attachment) => self.attach(*attachment, fds, asker, now),
                Request::Detach { device } => self.detach(&device, asker, now),
            };
            let Err(refused) = begun else { continue };
            self.clients.answer(asker, Answer::Refused(refused), now);
        }
    }

    /// Makes a client a listener.
    fn listen(&mut self, channel: Channel, follow: bool, asker: Asker) -> Result<(), String> {
        let audience = match channel {
            Channel::Console => &mut self.console.audience,
            Channel::Log => &mut self.log.audience,
        };
        if !audience.has_room() {
            return Err(format!("{MOST_LISTENERS} others listen already"));
        }
        // One that is gone meanwhile hears nothing.
        if let Some(socket) = self.clients.release(asker, Answer::Listening) {
            audience.admit(socket, channel == Channel::Log, follow);
        }
        Ok(())
    }
}
